//! What is known of the tables that the stream tells of: how it describes them, what they are on this
//! server, and which of them this domain gets.

use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;

use super::Planner;
use crate::apply::fold::Shape;
use crate::apply::relation::{Column, Keeper, Relation};
use crate::client::Client;
use crate::pgoutput::{self, Message};
use crate::record::Record;

impl Planner {
    /// Forgets the definitions: the reader starts anew and brings them.
    pub fn forget_relations(&mut self) {
        self.relations.clear();
    }

    /// Whether a change of the routing has been planned since the last reload.
    pub fn routing_changed(&self) -> bool {
        self.routing_changed
    }

    /// Every table is to be looked at again.
    pub fn forget_lookups(&mut self) {
        for relation in self.relations.values_mut() {
            relation.looked_up = false;
            relation.shape = None;
        }
        self.forget_statements();
    }

    /// Whether this domain gets a table.
    pub fn is_routed(&self, namespace: &str, name: &str) -> bool {
        let place = (namespace.to_owned(), name.to_owned());
        !self.elsewhere.contains(&place)
    }

    /// Takes in what the transaction under way has changed of the routing so far; it may
    /// change more before it ends.
    pub async fn refresh_routing(&mut self, client: &mut Client) -> anyhow::Result<()> {
        if self.routing_changed {
            self.reload_routing(client).await?;
            self.routing_changed = true;
        }
        Ok(())
    }

    /// Reads which tables this domain does not get.
    pub async fn reload_routing(&mut self, client: &mut Client) -> anyhow::Result<()> {
        let rows = client
            .query(
                "SELECT nspname, relname FROM terrace.sync_table WHERE NOT $1 = ANY (domains)",
                &[Some(&self.domain)],
            )
            .await
            .context("read terrace.sync_table")?;
        self.elsewhere = rows
            .into_iter()
            .filter_map(|row| match <[_; 2]>::try_from(row) {
                Ok([Some(namespace), Some(name)]) => Some((namespace, name)),
                _ => None,
            })
            .collect();
        for relation in self.relations.values_mut() {
            let place = (relation.namespace.clone(), relation.name.clone());
            let routed = !self.elsewhere.contains(&place);
            relation.looked_up &= relation.routed || !routed;
            relation.routed = routed;
        }
        self.routing_changed = false;
        Ok(())
    }

    /// Takes a schema record in.
    pub fn define(&mut self, record: &Record) -> anyhow::Result<()> {
        let body = record.body();
        let Message::Relation(relation) = pgoutput::decode(&body)? else {
            return Ok(());
        };
        if self.is_defined(relation.relid, &body) {
            return Ok(());
        }
        let relid = relation.relid;
        let columns = relation
            .columns
            .iter()
            .map(|c| Column {
                name: c.name.to_owned(),
                key: c.key,
                local: None,
            })
            .collect();
        // Of its own: a part of a block that was read would keep all of that.
        let definition = Bytes::copy_from_slice(&body);
        let known = Relation {
            definition,
            namespace: relation.namespace.to_owned(),
            name: relation.name.to_owned(),
            place: None,
            columns,
            looked_up: false,
            oid: String::new(),
            routed: self.is_routed(relation.namespace, relation.name),
            primaries: 0,
            only: false,
            plain: false,
            keeper: Keeper::Nobody,
            identity: relation.identity,
            local_since: None,
            shape: None,
        };
        self.relations.insert(relid, known);
        Ok(())
    }

    /// Reads what the table looks like here, and those that came with it in a TRUNCATE.
    pub async fn lookup(&mut self, client: &mut Client, relid: u32) -> anyhow::Result<()> {
        let mut unknown = std::mem::take(&mut self.unknown);
        if !unknown.contains(&relid) {
            unknown = vec![relid];
        }
        self.refresh_routing(client).await?;
        for relid in unknown {
            let relation = self
                .relations
                .get_mut(&relid)
                .context("undefined relation")?;
            match relation.routed {
                true => relation.look_up(client).await?,
                false => relation.looked_up = true,
            }
        }
        Ok(())
    }

    /// Looks again at the tables here of these OIDs. Whether any is another than was known.
    pub async fn look_again(
        &mut self,
        client: &mut Client,
        oids: &[String],
    ) -> anyhow::Result<bool> {
        let mut altered = false;
        let known = |relation: &&mut Relation| relation.looked_up && oids.contains(&relation.oid);
        for relation in self.relations.values_mut().filter(known) {
            let before = relation.here();
            relation.looked_up = false;
            relation.look_up(client).await?;
            altered |= relation.here() != before;
        }
        Ok(altered)
    }

    /// Whether the table here of this OID is known to stand alone.
    pub fn stands_alone(&self, oid: &str) -> bool {
        let mut known = self.relations.values().filter(|one| one.looked_up);
        known.any(|relation| relation.oid == oid && relation.stands_alone())
    }

    /// Whether a table is known to be like this.
    pub fn has(&self, shape: &Arc<Shape>) -> bool {
        let mut known = self.relations.values().filter(|one| one.looked_up);
        known.any(|relation| relation.shape.as_ref() == Some(shape))
    }

    /// Whether a schema record says what is known already.
    pub fn knows(&self, record: &Record) -> bool {
        let body = record.body();
        match pgoutput::decode(&body) {
            Ok(Message::Relation(relation)) => self.is_defined(relation.relid, &body),
            decoded => decoded.is_ok(),
        }
    }

    fn is_defined(&self, relid: u32, definition: &Bytes) -> bool {
        let known = self.relations.get(&relid);
        known.is_some_and(|known| known.definition == *definition)
    }

    /// Whether a table must be looked up first. One that goes elsewhere need not be, unless
    /// this transaction may have changed that.
    pub(super) fn is_unknown(&self, relation: &Relation) -> bool {
        !relation.looked_up && (relation.routed || self.routing_changed)
    }
}
