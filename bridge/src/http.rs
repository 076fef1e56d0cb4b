//! `/metrics` for Prometheus, `/healthz` and `/readyz` for supervisors.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::clock::{PG_EPOCH_MICROS, unix_micros};
use crate::status::{Role, Shared, State};

/// What is counted of the events: name, kind of event, help.
const COUNTED: [(&str, &str, &str); 6] = [
    (
        "promotions",
        "master",
        "Times that this server became master",
    ),
    (
        "handovers",
        "handover",
        "Times that it handed over because it was out of order",
    ),
    (
        "gaps",
        "gap",
        "Times that a part of the history was to be had nowhere",
    ),
    ("resyncs", "resync", "Times that its data was copied anew"),
    (
        "divergences",
        "diverged",
        "Times that the top told another history",
    ),
    (
        "damages",
        "damaged",
        "Times that a part of the queue could not be read",
    ),
];

/// Serves until `cancel`.
pub async fn run(shared: Arc<Shared>, cancel: CancellationToken) -> anyhow::Result<()> {
    let listen = &shared.config.http.listen;
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen on {listen} ([http] listen)"))?;
    let (metrics_of, ready_of) = (Arc::clone(&shared), Arc::clone(&shared));
    let router = Router::new()
        .route("/metrics", get(move || async move { metrics(&metrics_of) }))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(move || async move { ready(&ready_of) }));
    axum::serve(listener, router)
        .with_graceful_shutdown(async move { cancel.cancelled().await })
        .await
        .context("serve HTTP")
}

fn ready(shared: &Shared) -> (StatusCode, String) {
    match shared.state() {
        (state @ (State::Streaming | State::Catchup), _) => (StatusCode::OK, format!("{state}\n")),
        (state, reason) => {
            let reason = reason.unwrap_or_default();
            (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{state}: {reason}\n"),
            )
        }
    }
}

type Reply = (StatusCode, [(header::HeaderName, &'static str); 1], String);

fn metrics(shared: &Shared) -> Reply {
    let node = &shared.config.node;
    let labels = [("node", &node.name), ("domain", &node.domain)]
        .map(|(name, value)| (name.into(), value.clone().into()));
    let mut registry = Registry::with_labels(labels.into_iter());
    let terrace = registry.sub_registry_with_prefix("terrace");
    let mut integer = |name: &str, help: &str, value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        terrace.register(name, help, gauge);
    };
    let applied = shared.applied();
    let (state, _) = shared.state();
    integer(
        "flush_lsn",
        "Durable end of the queue",
        shared.flushed.borrow().0 as i64,
    );
    integer(
        "replay_lsn",
        "End of what is applied",
        shared.replayed.borrow().0 as i64,
    );
    integer(
        "master",
        "1 on the domain's master",
        i64::from(shared.role() == Role::Master),
    );
    for known in State::ALL {
        integer(
            &known.to_string(),
            &format!("1 when {known}"),
            i64::from(state == known),
        );
    }
    let (equal, disputed) = shared.matching();
    integer(
        "equal_windows",
        "Parts of the history that another server of the domain holds equally",
        equal as i64,
    );
    integer(
        "disputed",
        "1 when another server of the domain holds a part of the history differently",
        i64::from(disputed),
    );
    integer(
        "downstreams",
        "Bridges connected",
        shared.downstreams().len() as i64,
    );
    let mut counter = |name: &str, help: &str, value: u64| {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        terrace.register(name, help, counter);
    };
    let done = [
        (
            "applied_transactions",
            "Transactions applied",
            applied.transactions,
        ),
        ("conflicts", "Conflicts resolved", applied.conflicts),
    ];
    for (name, help, value) in done {
        counter(name, help, value);
    }
    for (name, kind, help) in COUNTED {
        counter(name, help, shared.happened(kind));
    }
    let lag = match applied.top_time {
        0 => f64::NAN,
        time => ((unix_micros() - PG_EPOCH_MICROS - time) as f64 / 1e6).max(0.0),
    };
    let gauge = Gauge::<f64, AtomicU64>::default();
    gauge.set(lag);
    terrace.register(
        "replay_age_seconds",
        "Age of the top's clock at the replayed end",
        gauge,
    );
    let mut text = String::new();
    let status = match encode(&mut text, &registry) {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (status, [(header::CONTENT_TYPE, kind)], text)
}
