//! JSON for databases whose encoding does not have every character.

/// The same in ASCII alone: what comes to a character that there is none of is left to who reads it.
pub fn escape(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() {
            escaped.push(character);
        } else {
            let units = &mut [0; 2];
            for unit in character.encode_utf16(units) {
                escaped += &format!("\\u{unit:04x}");
            }
        }
    }
    escaped
}

/// With `?` for what is not ASCII.
pub fn plain(json: &str) -> String {
    json.replace(|character: char| !character.is_ascii(), "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_escaped_is_the_same_to_who_reads_it() {
        let value = serde_json::json!({ "label": "é \u{20ac} \u{1f600} \\u20ac \"" });
        let text = value.to_string();
        assert!(escape(&text).is_ascii());
        let read: serde_json::Value = serde_json::from_str(&escape(&text)).unwrap();
        assert_eq!(read, value);
        assert_eq!(plain("\"a € b\""), "\"a ? b\"");
    }
}
