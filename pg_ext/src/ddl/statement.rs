//! What a parsed statement is about.
//!
//! Nodes are those of PostgreSQL's `nodes/parsenodes.h`. Every function that takes one is
//! given a statement of the parser with its own tag, which is all that makes its casts sound.

use std::ffi::{CStr, c_char, c_int};

use pgrx::pg_sys::{self, AlterTableType, NodeTag, ObjectType};

/// What travels. Roles, databases, publications and the like are each server's own.
pub const TRAVELS: &[NodeTag] = &[
    NodeTag::T_CreateStmt,
    NodeTag::T_CreateTableAsStmt,
    NodeTag::T_AlterTableStmt,
    NodeTag::T_IndexStmt,
    NodeTag::T_DropStmt,
    NodeTag::T_RenameStmt,
    NodeTag::T_AlterObjectSchemaStmt,
    NodeTag::T_AlterOwnerStmt,
    NodeTag::T_ViewStmt,
    NodeTag::T_RefreshMatViewStmt,
    NodeTag::T_CreateFunctionStmt,
    NodeTag::T_AlterFunctionStmt,
    NodeTag::T_CreateTrigStmt,
    NodeTag::T_CreateSchemaStmt,
    NodeTag::T_CreateSeqStmt,
    NodeTag::T_AlterSeqStmt,
    NodeTag::T_DefineStmt,
    NodeTag::T_CompositeTypeStmt,
    NodeTag::T_CreateEnumStmt,
    NodeTag::T_AlterEnumStmt,
    NodeTag::T_CreateRangeStmt,
    NodeTag::T_AlterTypeStmt,
    NodeTag::T_CreateDomainStmt,
    NodeTag::T_AlterDomainStmt,
    NodeTag::T_CommentStmt,
    NodeTag::T_CreateStatsStmt,
    NodeTag::T_AlterStatsStmt,
    NodeTag::T_CreatePolicyStmt,
    NodeTag::T_AlterPolicyStmt,
    NodeTag::T_RuleStmt,
    NodeTag::T_CreateCastStmt,
    NodeTag::T_CreateExtensionStmt,
    NodeTag::T_AlterExtensionStmt,
    NodeTag::T_CreateOpClassStmt,
    NodeTag::T_CreateOpFamilyStmt,
    NodeTag::T_AlterTSDictionaryStmt,
    NodeTag::T_AlterTSConfigurationStmt,
    NodeTag::T_AlterExtensionContentsStmt,
    NodeTag::T_AlterObjectDependsStmt,
    NodeTag::T_CreateConversionStmt,
    NodeTag::T_CreateTransformStmt,
    NodeTag::T_CreatePLangStmt,
    NodeTag::T_AlterOpFamilyStmt,
    NodeTag::T_AlterOperatorStmt,
];

/// Kinds of objects that are each server's own.
const OF_ITS_OWN: &[ObjectType::Type] = &[
    ObjectType::OBJECT_DATABASE,
    ObjectType::OBJECT_ROLE,
    ObjectType::OBJECT_TABLESPACE,
    ObjectType::OBJECT_PUBLICATION,
    ObjectType::OBJECT_SUBSCRIPTION,
    ObjectType::OBJECT_EVENT_TRIGGER,
    ObjectType::OBJECT_FDW,
    ObjectType::OBJECT_FOREIGN_SERVER,
    ObjectType::OBJECT_FOREIGN_TABLE,
    ObjectType::OBJECT_USER_MAPPING,
];

/// Names a statement as it must be told.
pub type Name = (String, String);

/// Whether a statement is about what is this server's, or this session's, own. An error
/// for one that is about both.
///
/// # Safety
/// See the module.
pub unsafe fn stays(node: *mut pg_sys::Node, tag: NodeTag) -> Result<bool, &'static str> {
    // SAFETY: see the module; names of extensions are strings.
    unsafe {
        let of_terrace = match tag {
            NodeTag::T_CreateExtensionStmt => {
                is_terrace((*node.cast::<pg_sys::CreateExtensionStmt>()).extname)
            }
            NodeTag::T_AlterExtensionStmt => {
                is_terrace((*node.cast::<pg_sys::AlterExtensionStmt>()).extname)
            }
            NodeTag::T_DropStmt => {
                let drop = &*node.cast::<pg_sys::DropStmt>();
                drop.removeType == ObjectType::OBJECT_EXTENSION
                    && elements::<pg_sys::String>(drop.objects)
                        .into_iter()
                        .any(|name| is_terrace((*name).sval))
            }
            _ => false,
        };
        let own = kind(node, tag).is_some_and(|kind| OF_ITS_OWN.contains(&kind));
        let relations = relations(node, tag);
        let temporary = relations.iter().filter(|name| is_temporary(**name)).count();
        if temporary > 0 && temporary < relations.len() {
            return Err(
                "temporary tables and others cannot be dropped by one replicated statement",
            );
        }
        let named = names(node, tag);
        let temporary = temporary > 0 || named.iter().any(|names| is_temporary_name(*names));
        if tag == NodeTag::T_CreateStmt && !temporary {
            let create = &*node.cast::<pg_sys::CreateStmt>();
            let parts = elements::<pg_sys::Node>(create.tableElts).into_iter();
            let mut like = parts.filter(|part| (**part).type_ == NodeTag::T_TableLikeClause);
            if like.any(|like| is_temporary((*like.cast::<pg_sys::TableLikeClause>()).relation)) {
                return Err("a replicated table cannot be made like a temporary one");
            }
        }
        Ok(of_terrace || own || temporary)
    }
}

/// Of what kind the object is that a statement names, where the statement says so.
unsafe fn kind(node: *mut pg_sys::Node, tag: NodeTag) -> Option<ObjectType::Type> {
    // SAFETY: see the module.
    Some(unsafe {
        match tag {
            NodeTag::T_AlterTableStmt => (*node.cast::<pg_sys::AlterTableStmt>()).objtype,
            NodeTag::T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).renameType,
            NodeTag::T_AlterObjectSchemaStmt => {
                (*node.cast::<pg_sys::AlterObjectSchemaStmt>()).objectType
            }
            NodeTag::T_AlterOwnerStmt => (*node.cast::<pg_sys::AlterOwnerStmt>()).objectType,
            NodeTag::T_CommentStmt => (*node.cast::<pg_sys::CommentStmt>()).objtype,
            NodeTag::T_DropStmt => (*node.cast::<pg_sys::DropStmt>()).removeType,
            _ => return None,
        }
    })
}

/// The relations that a statement makes or changes.
unsafe fn relations(node: *mut pg_sys::Node, tag: NodeTag) -> Vec<*mut pg_sys::RangeVar> {
    // SAFETY: see the module.
    unsafe {
        let relation = match tag {
            NodeTag::T_CreateStmt => (*node.cast::<pg_sys::CreateStmt>()).relation,
            NodeTag::T_CreateTableAsStmt => (*(*node.cast::<pg_sys::CreateTableAsStmt>()).into).rel,
            NodeTag::T_ViewStmt => (*node.cast::<pg_sys::ViewStmt>()).view,
            NodeTag::T_CreateSeqStmt => (*node.cast::<pg_sys::CreateSeqStmt>()).sequence,
            NodeTag::T_CompositeTypeStmt => (*node.cast::<pg_sys::CompositeTypeStmt>()).typevar,
            _ => return changed(node, tag),
        };
        vec![relation]
    }
}

/// The relations that a statement changes, itself or what belongs to them.
unsafe fn changed(node: *mut pg_sys::Node, tag: NodeTag) -> Vec<*mut pg_sys::RangeVar> {
    // SAFETY: see the module.
    unsafe {
        let relation = match tag {
            NodeTag::T_AlterSeqStmt => (*node.cast::<pg_sys::AlterSeqStmt>()).sequence,
            NodeTag::T_AlterTableStmt => (*node.cast::<pg_sys::AlterTableStmt>()).relation,
            NodeTag::T_IndexStmt => (*node.cast::<pg_sys::IndexStmt>()).relation,
            NodeTag::T_CreateTrigStmt => (*node.cast::<pg_sys::CreateTrigStmt>()).relation,
            NodeTag::T_RuleStmt => (*node.cast::<pg_sys::RuleStmt>()).relation,
            NodeTag::T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).relation,
            NodeTag::T_CreatePolicyStmt => (*node.cast::<pg_sys::CreatePolicyStmt>()).table,
            NodeTag::T_AlterPolicyStmt => (*node.cast::<pg_sys::AlterPolicyStmt>()).table,
            NodeTag::T_RefreshMatViewStmt => (*node.cast::<pg_sys::RefreshMatViewStmt>()).relation,
            NodeTag::T_AlterObjectSchemaStmt => {
                (*node.cast::<pg_sys::AlterObjectSchemaStmt>()).relation
            }
            NodeTag::T_CreateStatsStmt => {
                return elements((*node.cast::<pg_sys::CreateStatsStmt>()).relations);
            }
            NodeTag::T_CommentStmt => {
                let comment = &*node.cast::<pg_sys::CommentStmt>();
                return named(comment.object.cast(), comment.objtype)
                    .into_iter()
                    .collect();
            }
            NodeTag::T_DropStmt => {
                let drop = &*node.cast::<pg_sys::DropStmt>();
                let names = elements::<pg_sys::List>(drop.objects).into_iter();
                return names
                    .filter_map(|names| named(names, drop.removeType))
                    .collect();
            }
            _ => return Vec::new(),
        };
        if relation.is_null() {
            return Vec::new();
        }
        vec![relation]
    }
}

/// The relation in the name of an object of this kind: the whole of it, or all but the last
/// part.
unsafe fn named(names: *mut pg_sys::List, kind: ObjectType::Type) -> Option<*mut pg_sys::RangeVar> {
    use ObjectType::*;
    let rest = match kind {
        OBJECT_TABLE | OBJECT_VIEW | OBJECT_MATVIEW | OBJECT_INDEX | OBJECT_SEQUENCE => 0,
        OBJECT_TRIGGER | OBJECT_RULE | OBJECT_POLICY | OBJECT_COLUMN | OBJECT_TABCONSTRAINT => 1,
        _ => return None,
    };
    // SAFETY: the names of these are lists of strings.
    unsafe {
        let length = (*names).length - rest;
        (length > 0).then(|| {
            pg_sys::makeRangeVarFromNameList(pg_sys::list_truncate(
                pg_sys::list_copy(names),
                length,
            ))
        })
    }
}

/// The names of what is no relation and is made or changed.
unsafe fn names(node: *mut pg_sys::Node, tag: NodeTag) -> Vec<*mut pg_sys::List> {
    // SAFETY: see the module.
    unsafe {
        let object = match tag {
            NodeTag::T_CreateFunctionStmt => {
                return vec![(*node.cast::<pg_sys::CreateFunctionStmt>()).funcname];
            }
            NodeTag::T_DefineStmt => return vec![(*node.cast::<pg_sys::DefineStmt>()).defnames],
            NodeTag::T_CreateEnumStmt => {
                return vec![(*node.cast::<pg_sys::CreateEnumStmt>()).typeName];
            }
            NodeTag::T_CreateRangeStmt => {
                return vec![(*node.cast::<pg_sys::CreateRangeStmt>()).typeName];
            }
            NodeTag::T_CreateDomainStmt => {
                return vec![(*node.cast::<pg_sys::CreateDomainStmt>()).domainname];
            }
            NodeTag::T_DropStmt => {
                let objects = elements((*node.cast::<pg_sys::DropStmt>()).objects);
                return objects.into_iter().filter_map(|it| names_of(it)).collect();
            }
            NodeTag::T_AlterFunctionStmt => (*node.cast::<pg_sys::AlterFunctionStmt>()).func.cast(),
            NodeTag::T_CommentStmt => (*node.cast::<pg_sys::CommentStmt>()).object,
            NodeTag::T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).object,
            NodeTag::T_AlterOwnerStmt => (*node.cast::<pg_sys::AlterOwnerStmt>()).object,
            NodeTag::T_AlterObjectSchemaStmt => {
                (*node.cast::<pg_sys::AlterObjectSchemaStmt>()).object
            }
            _ => return Vec::new(),
        };
        names_of(object).into_iter().collect()
    }
}

/// The name of a function or type.
unsafe fn names_of(object: *mut pg_sys::Node) -> Option<*mut pg_sys::List> {
    // SAFETY: an object of the parser; its tag says what it is.
    unsafe {
        match object.as_ref()?.type_ {
            NodeTag::T_ObjectWithArgs => Some((*object.cast::<pg_sys::ObjectWithArgs>()).objname),
            NodeTag::T_TypeName => Some((*object.cast::<pg_sys::TypeName>()).names),
            _ => None,
        }
    }
}

/// Names of the relations that are here and are changed: a server below that never had them
/// need not run the statement.
///
/// # Safety
/// See the module.
pub unsafe fn about(node: *mut pg_sys::Node, tag: NodeTag) -> Vec<Name> {
    // SAFETY: see the module; each relation that is found has a name and a schema.
    unsafe {
        changed(node, tag)
            .into_iter()
            .map(|name| look_up(name))
            .filter(|found| *found != pg_sys::InvalidOid)
            .map(|found| (schema_of(found), text(pg_sys::get_rel_name(found))))
            .collect()
    }
}

/// Whether a statement that is said to be fine with what is not there (IF EXISTS) finds nothing
/// of what it names: a server below may have a table of its own by that name.
///
/// # Safety
/// See the module.
pub unsafe fn finds_nothing(node: *mut pg_sys::Node, tag: NodeTag) -> bool {
    // SAFETY: see the module.
    unsafe {
        let missing_ok = match tag {
            NodeTag::T_DropStmt => (*node.cast::<pg_sys::DropStmt>()).missing_ok,
            NodeTag::T_AlterTableStmt => (*node.cast::<pg_sys::AlterTableStmt>()).missing_ok,
            NodeTag::T_AlterSeqStmt => (*node.cast::<pg_sys::AlterSeqStmt>()).missing_ok,
            NodeTag::T_RenameStmt => (*node.cast::<pg_sys::RenameStmt>()).missing_ok,
            NodeTag::T_AlterObjectSchemaStmt => {
                (*node.cast::<pg_sys::AlterObjectSchemaStmt>()).missing_ok
            }
            _ => false,
        };
        if tag == NodeTag::T_DropStmt
            && !super::drop::is_relation((*node.cast::<pg_sys::DropStmt>()).removeType)
        {
            let drop = &*node.cast::<pg_sys::DropStmt>();
            return missing_ok && super::drop::found(drop).is_empty();
        }
        missing_ok && !changed(node, tag).is_empty() && about(node, tag).is_empty()
    }
}

/// The partitioned table that a statement makes a partition for, or takes one from.
///
/// # Safety
/// See the module.
pub unsafe fn part_of(node: *mut pg_sys::Node, tag: NodeTag) -> Option<Name> {
    // SAFETY: see the module; the tag says what the node is, and a command's kind what it is about.
    unsafe {
        let parent = match tag {
            NodeTag::T_CreateStmt => {
                let create = &*node.cast::<pg_sys::CreateStmt>();
                let parents = elements::<pg_sys::RangeVar>(create.inhRelations);
                (!create.partbound.is_null()).then(|| parents.first().copied())??
            }
            NodeTag::T_AlterTableStmt => {
                let alter = &*node.cast::<pg_sys::AlterTableStmt>();
                elements::<pg_sys::AlterTableCmd>(alter.cmds)
                    .into_iter()
                    .any(|command| {
                        [
                            AlterTableType::AT_AttachPartition,
                            AlterTableType::AT_DetachPartition,
                            AlterTableType::AT_DetachPartitionFinalize,
                        ]
                        .contains(&(*command).subtype)
                    })
                    .then_some(alter.relation)?
            }
            _ => return None,
        };
        let table = look_up(parent);
        (table != pg_sys::InvalidOid).then(|| (schema_of(table), text(pg_sys::get_rel_name(table))))
    }
}

unsafe fn schema_of(relation: pg_sys::Oid) -> String {
    // SAFETY: a relation that exists.
    unsafe {
        text(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(
            relation,
        )))
    }
}

pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The name of an index, if it is given one; it is where its table is.
///
/// # Safety
/// The statement comes from the parser.
pub unsafe fn index_name(index: &pg_sys::IndexStmt) -> Option<String> {
    // SAFETY: an index is one of a relation.
    unsafe {
        let table = look_up(index.relation);
        (!index.idxname.is_null() && table != pg_sys::InvalidOid).then(|| {
            format!(
                "{}.{}",
                quoted(&schema_of(table)),
                quoted(&text(index.idxname))
            )
        })
    }
}

/// Of an ALTER TABLE that detaches a partition without holding others up: one that does it at
/// once. Below it must run with the rights of a role that it cannot leave, as what the table is
/// partitioned by is evaluated, and so within a transaction.
///
/// # Safety
/// The statement comes from the parser.
pub unsafe fn detach_at_once(alter: &pg_sys::AlterTableStmt) -> Option<String> {
    // SAFETY: the command's kind says what its definition is.
    unsafe {
        let name = |range: *mut pg_sys::RangeVar| {
            let schema = text((*range).schemaname);
            let table = quoted(&text((*range).relname));
            match schema.is_empty() {
                true => table,
                false => format!("{}.{table}", quoted(&schema)),
            }
        };
        elements::<pg_sys::AlterTableCmd>(alter.cmds)
            .into_iter()
            .filter(|command| (**command).subtype == AlterTableType::AT_DetachPartition)
            .map(|command| (*command).def.cast::<pg_sys::PartitionCmd>())
            .find(|part| (**part).concurrent)
            .map(|part| {
                let (whole, part) = (name(alter.relation), name((*part).name));
                format!("ALTER TABLE {whole} DETACH PARTITION {part}")
            })
    }
}

/// # Safety
/// A list of pointers to `T`, or null.
pub unsafe fn elements<T>(list: *const pg_sys::List) -> Vec<*mut T> {
    // SAFETY: a list has as many cells as it says.
    unsafe {
        list.as_ref().map_or_else(Vec::new, |list| {
            std::slice::from_raw_parts(list.elements, list.length as usize)
                .iter()
                .map(|cell| cell.ptr_value.cast())
                .collect()
        })
    }
}

/// # Safety
/// A string that ends with a zero, or null.
pub unsafe fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: as said.
    unsafe { CStr::from_ptr(string) }
        .to_string_lossy()
        .into_owned()
}

unsafe fn is_terrace(name: *const c_char) -> bool {
    // SAFETY: a string of the parser, or null.
    unsafe { text(name) == "terrace" }
}

/// The relation of this name, if there is one.
///
/// # Safety
/// A name from the parser.
pub unsafe fn look_up(name: *const pg_sys::RangeVar) -> pg_sys::Oid {
    let missing = pg_sys::RVROption::RVR_MISSING_OK;
    let lock = pg_sys::NoLock as c_int;
    // SAFETY: a name from the parser; a look-up that takes no lock may find nothing.
    unsafe { pg_sys::RangeVarGetRelidExtended(name, lock, missing, None, std::ptr::null_mut()) }
}

/// # Safety
/// A name from the parser.
pub unsafe fn is_temporary(name: *const pg_sys::RangeVar) -> bool {
    const TEMPORARY: c_char = b't' as c_char;
    // SAFETY: as said.
    unsafe {
        if (*name).relpersistence == TEMPORARY || text((*name).schemaname).starts_with("pg_temp") {
            return true;
        }
        let found = look_up(name);
        found != pg_sys::InvalidOid && pg_sys::get_rel_persistence(found) == TEMPORARY
    }
}

unsafe fn is_temporary_name(names: *const pg_sys::List) -> bool {
    // SAFETY: names are lists of strings.
    unsafe {
        let names = elements::<pg_sys::String>(names);
        names.len() > 1 && text((*names[0]).sval).starts_with("pg_temp")
    }
}
