//! Whether an ALTER TABLE gives rows values that may be others on every server, so that they are sent
//! once more.
//!
//! Nodes are those of PostgreSQL's `nodes/parsenodes.h`, as in [`super::statement`].

use std::ffi::c_void;

use pgrx::pg_sys::{self, AlterTableType, NodeTag};

use super::statement::{elements, look_up, text};

/// The table whose rows an ALTER TABLE may change in a way of its own on every server, as
/// by a default that calls a function.
///
/// # Safety
/// The statement comes from the parser.
pub unsafe fn fills(alter: &pg_sys::AlterTableStmt) -> Option<pg_sys::Oid> {
    // SAFETY: the command's kind says what its definition is.
    unsafe {
        let fills = elements::<pg_sys::AlterTableCmd>(alter.cmds)
            .into_iter()
            .filter(|command| {
                let column = (**command).def;
                !column.is_null() && (*column).type_ == NodeTag::T_ColumnDef
            })
            .any(|command| match (*command).subtype {
                AlterTableType::AT_AddColumn => is_filled(alter.relation, command),
                AlterTableType::AT_AlterColumnType => is_converted(alter.relation, command),
                _ => false,
            });
        let table = fills.then(|| look_up(alter.relation))?;
        (table != pg_sys::InvalidOid).then_some(table)
    }
}

/// Whether a new column has values that may be others on every server. What is generated is computed
/// there anyhow, and a CHECK gives no value.
unsafe fn is_filled(table: *const pg_sys::RangeVar, command: *const pg_sys::AlterTableCmd) -> bool {
    // SAFETY: a command that adds a column.
    unsafe {
        let column = (*command).def.cast::<pg_sys::ColumnDef>();
        let constraints = elements::<pg_sys::Constraint>((*column).constraints);
        let has = |kind| {
            let mut constraints = constraints.iter();
            constraints.find(|constraint| (***constraint).contype == kind)
        };
        let is_identity = has(pg_sys::ConstrType::CONSTR_IDENTITY).is_some();
        is_serial((*column).typeName)
            || is_identity
            || match has(pg_sys::ConstrType::CONSTR_DEFAULT) {
                Some(default) => {
                    let value = (**default).raw_expr;
                    is_of_money(table, command) || differs(value, table, command)
                }
                None => has_default(column),
            }
    }
}

/// Whether a column comes to its new type in a way that may be another one on every server.
unsafe fn is_converted(
    table: *const pg_sys::RangeVar,
    command: *const pg_sys::AlterTableCmd,
) -> bool {
    // SAFETY: a command that gives a column another type.
    unsafe {
        let using = (*(*command).def.cast::<pg_sys::ColumnDef>()).raw_default;
        is_of_money(table, command)
            || is_cast_by_a_user(table, command)
            // What was text may be the name of a moment in any row.
            || !using.is_null() && (tree_of(using).contains(CAST) || differs(using, table, command))
    }
}

/// In the text of a tree (`outfuncs.c`).
const CAST: &str = "{TYPECAST";

unsafe fn tree_of(node: *mut pg_sys::Node) -> String {
    // SAFETY: outfuncs.c knows its nodes.
    unsafe { text(pg_sys::nodeToString(node.cast::<c_void>())) }
}

/// Whether an expression may have another value on every server: it calls something (an operator is
/// a function, too), or names a moment in a value that is not mere text.
unsafe fn differs(
    value: *mut pg_sys::Node,
    table: *const pg_sys::RangeVar,
    command: *const pg_sys::AlterTableCmd,
) -> bool {
    const CALLS: [&str; 4] = ["{FUNCCALL", "{SQLVALUEFUNCTION", "{SUBLINK", "{A_EXPR"];
    // The types of times take blanks and capitals.
    const MOMENTS: [&str; 4] = ["now", "today", "tomorrow", "yesterday"];
    // Categories of `pg_type`: numbers, words and the like, which are no times nor have any in them.
    const OTHERS: &[u8] = b"SNBEVIG";
    if value.is_null() {
        return false;
    }
    // SAFETY: an expression of the parser; as in `types_of`, and the type is there.
    unsafe {
        let tree = tree_of(value);
        if CALLS.iter().any(|call| tree.contains(call)) {
            return true;
        }
        let [_, new] = types_of(table, command);
        let is_other = new.is_some_and(|new| {
            let base = pg_sys::getBaseType(new);
            let element = pg_sys::get_element_type(base);
            let one = match element == pg_sys::InvalidOid {
                true => base,
                false => pg_sys::getBaseType(element),
            };
            let (mut category, mut preferred) = (0, false);
            pg_sys::get_type_category_preferred(one, &mut category, &mut preferred);
            OTHERS.contains(&(category as u8))
        });
        if is_other && !tree.contains(CAST) {
            return false;
        }
        // No node is called so, and a column that is costs no more than rows that are sent.
        let mut words = tree.split(|c: char| !c.is_alphabetic());
        words.any(|word| {
            MOMENTS
                .iter()
                .any(|moment| word.eq_ignore_ascii_case(moment))
        })
    }
}

/// Whether a type is a number that comes from a sequence (`transformColumnDefinition` in
/// `parse_utilcmd.c`).
unsafe fn is_serial(name: *const pg_sys::TypeName) -> bool {
    const SERIAL: [&str; 6] = [
        "serial",
        "serial2",
        "serial4",
        "serial8",
        "smallserial",
        "bigserial",
    ];
    // SAFETY: a name of the parser, which is a list of strings.
    unsafe {
        let names = elements::<pg_sys::String>((*name).names);
        let [only] = names[..] else {
            return false;
        };
        !(*name).pct_type && SERIAL.contains(&text((*only).sval).as_str())
    }
}

/// The types that a column has and is to have, of those that are there.
unsafe fn types_of(
    table: *const pg_sys::RangeVar,
    command: *const pg_sys::AlterTableCmd,
) -> [Option<pg_sys::Oid>; 2] {
    // SAFETY: a command that adds a column or gives one another type; look-ups find nothing where
    // there is nothing.
    unsafe {
        let column = (*command).def.cast::<pg_sys::ColumnDef>();
        let table = look_up(table);
        let old = match table == pg_sys::InvalidOid || (*command).name.is_null() {
            true => pg_sys::InvalidOid,
            false => pg_sys::get_atttype(table, pg_sys::get_attnum(table, (*command).name)),
        };
        let new = pg_sys::LookupTypeNameOid(std::ptr::null_mut(), (*column).typeName, true);
        [old, new].map(|found| Some(found).filter(|found| *found != pg_sys::InvalidOid))
    }
}

/// Whether a column is or was of a type that is written by `lc_monetary`, which is each server's own.
unsafe fn is_of_money(
    table: *const pg_sys::RangeVar,
    command: *const pg_sys::AlterTableCmd,
) -> bool {
    const MONEY: [pg_sys::Oid; 2] = [pg_sys::MONEYOID, pg_sys::MONEYARRAYOID];
    // SAFETY: as in `types_of`; the types are there.
    unsafe {
        let mut types = types_of(table, command).into_iter().flatten();
        types.any(|found| MONEY.contains(&pg_sys::getBaseType(found)))
    }
}

/// Whether a column comes to its new type by a cast that a user has made.
unsafe fn is_cast_by_a_user(
    table: *const pg_sys::RangeVar,
    command: *const pg_sys::AlterTableCmd,
) -> bool {
    // SAFETY: as in `types_of`; the types are there.
    unsafe {
        let [Some(old), Some(new)] = types_of(table, command) else {
            return false;
        };
        let mut function = pg_sys::InvalidOid;
        let assignment = pg_sys::CoercionContext::COERCION_ASSIGNMENT;
        pg_sys::find_coercion_pathway(new, old, assignment, &mut function);
        function.to_u32() >= pg_sys::FirstNormalObjectId
    }
}

/// Whether a new column is of a type, as a domain may be one, that says what stands in it.
unsafe fn has_default(column: *const pg_sys::ColumnDef) -> bool {
    // SAFETY: the look-up finds nothing where there is no such type yet.
    unsafe {
        let found = pg_sys::LookupTypeNameOid(std::ptr::null_mut(), (*column).typeName, true);
        found != pg_sys::InvalidOid && !pg_sys::get_typdefault(found).is_null()
    }
}
