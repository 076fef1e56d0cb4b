//! `/metrics` for Prometheus, `/healthz` and `/readyz` for supervisors.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::{self, Poll};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};
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

/// Connections at the same time: a supervisor and some scrapers; others wait …
const MAX_VISITS: usize = 64;
/// … and none is served for longer.
const VISIT: Duration = Duration::from_secs(15);
/// An answer that is under way when the bridge ends gets so long.
const FAREWELL: Duration = Duration::from_secs(1);

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
    let door = Door {
        listener,
        places: Arc::new(Semaphore::new(MAX_VISITS)),
    };
    let ends = cancel.clone();
    let serving =
        axum::serve(door, router).with_graceful_shutdown(async move { ends.cancelled().await });
    tokio::select! {
        served = serving => served.context("serve HTTP"),
        // Who has not said all yet is not waited for.
        () = async { cancel.cancelled().await; sleep(FAREWELL).await } => Ok(()),
    }
}

/// Lets few in at a time, and nobody for long: anyone may come.
struct Door {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

struct Visit {
    tcp: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl axum::serve::Listener for Door {
    type Io = Visit;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Visit, SocketAddr) {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (tcp, from) = axum::serve::Listener::accept(&mut self.listener).await;
        let visit = Visit {
            tcp,
            end: Box::pin(sleep(VISIT)),
            _place: place,
        };
        (visit, from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl AsyncRead for Visit {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.tcp).poll_read(context, into)
    }
}

impl AsyncWrite for Visit {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.end.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.tcp).poll_write(context, from)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
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
