//! DROP statements, such that servers below drop what the top drops and nothing else.

use pgrx::pg_sys::{self, ObjectType};

use super::statement::{Name, elements, quoted, text};

/// Whether an object of this kind is a relation, which `DropStmt` names as one.
pub fn is_relation(kind: ObjectType::Type) -> bool {
    relation_kind(kind).is_some()
}

fn relation_kind(kind: ObjectType::Type) -> Option<&'static str> {
    Some(match kind {
        ObjectType::OBJECT_TABLE => "TABLE",
        ObjectType::OBJECT_VIEW => "VIEW",
        ObjectType::OBJECT_MATVIEW => "MATERIALIZED VIEW",
        ObjectType::OBJECT_SEQUENCE => "SEQUENCE",
        ObjectType::OBJECT_INDEX => "INDEX",
        _ => return None,
    })
}

/// Of what else a statement can drop several at once.
fn other_kind(kind: ObjectType::Type) -> Option<&'static str> {
    Some(match kind {
        ObjectType::OBJECT_FUNCTION => "FUNCTION",
        ObjectType::OBJECT_PROCEDURE => "PROCEDURE",
        ObjectType::OBJECT_AGGREGATE | ObjectType::OBJECT_ROUTINE => "ROUTINE",
        ObjectType::OBJECT_TYPE => "TYPE",
        ObjectType::OBJECT_DOMAIN => "DOMAIN",
        ObjectType::OBJECT_SCHEMA => "SCHEMA",
        ObjectType::OBJECT_COLLATION => "COLLATION",
        ObjectType::OBJECT_STATISTIC_EXT => "STATISTICS",
        _ => return None,
    })
}

/// A DROP of several objects, such that a server which never had some of those that are here,
/// `about` if they are relations, drops the others, and nothing that is not here.
///
/// # Safety
/// The statement comes from the parser.
pub unsafe fn of_several(drop: &pg_sys::DropStmt, about: &[Name]) -> Option<String> {
    // SAFETY: as said.
    let several = unsafe { elements::<pg_sys::Node>(drop.objects) }.len();
    if several < 2 {
        return None;
    }
    let (kind, names) = if let Some(kind) = relation_kind(drop.removeType) {
        let name = |(schema, name): &Name| format!("{}.{}", quoted(schema), quoted(name));
        (kind, about.iter().map(name).collect::<Vec<_>>())
    } else {
        // SAFETY: as said.
        let found = unsafe { found(drop) };
        if found.len() == several {
            return None;
        }
        (other_kind(drop.removeType)?, found)
    };
    let behavior = match drop.behavior {
        pg_sys::DropBehavior::DROP_CASCADE => " CASCADE",
        _ => "",
    };
    (!names.is_empty()).then(|| format!("DROP {kind} IF EXISTS {}{behavior}", names.join(", ")))
}

/// What a DROP of no relations finds here, as SQL names it. Locks it, as PostgreSQL is about to do
/// (`RemoveObjects` in `dropcmds.c`).
///
/// # Safety
/// The statement comes from the parser.
pub unsafe fn found(drop: &pg_sys::DropStmt) -> Vec<String> {
    let lock = pg_sys::AccessExclusiveLock as pg_sys::LOCKMODE;
    // SAFETY: objects of the kind that the statement says; a relation that is opened on the way is
    // closed, and stays locked.
    unsafe {
        elements::<pg_sys::Node>(drop.objects)
            .into_iter()
            .filter_map(|object| {
                let mut relation = std::ptr::null_mut();
                let address =
                    pg_sys::get_object_address(drop.removeType, object, &mut relation, lock, true);
                if !relation.is_null() {
                    pg_sys::relation_close(relation, pg_sys::NoLock as pg_sys::LOCKMODE);
                }
                (address.objectId != pg_sys::InvalidOid)
                    .then(|| text(pg_sys::getObjectIdentity(&address, true)))
            })
            .collect()
    }
}
