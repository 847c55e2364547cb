//! `tojson` as transformers defines it for chat templates: json.dumps of Python with ensure_ascii off, so that the prompt
//! is byte for byte what the model was trained on.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use std::fmt::Write;

use crate::guard::is_stand_in;

/// Values nest as deep as JSON may (128); one that a template nested deeper is refused.
const MAX_DEPTH: usize = 200;
/// Fuel pays for 64 bytes; charging in steps keeps a value that shares its parts from growing without bound.
const CHARGE_BYTES: usize = 4096;

struct Style {
    ensure_ascii: bool,
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The filter: `value | tojson(ensure_ascii, indent, separators, sort_keys)`.
pub fn tojson(state: &State, value: Value, ensure_ascii: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<Value> = kwargs.get("indent")?;
    let separators: Option<Value> = kwargs.get("separators")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let indent = indent.filter(|value| !value.is_none()).map(|value| value.as_usize().unwrap_or(0).min(32));
    let default = (if indent.is_some() { "," } else { ", " }, ": ");
    let (item_separator, key_separator) = match separators.filter(|value| !value.is_none()) {
        None => (default.0.to_string(), default.1.to_string()),
        Some(pair) => {
            let part = |index| -> Result<String, Error> { Ok(pair.get_item_by_index(index)?.to_string()) };
            (part(0)?, part(1)?)
        }
    };
    let style = Style {
        ensure_ascii: ascii.unwrap_or(ensure_ascii.is_some_and(|value| value.is_true())),
        indent,
        item_separator,
        key_separator,
        sort_keys: sort_keys.unwrap_or(false),
    };
    let mut writer = Writer { state, style, out: String::new(), charged: 0 };
    writer.value(&value, 0)?;
    Ok(Value::from(writer.out))
}

struct Writer<'a, 'env> {
    state: &'a State<'a, 'env>,
    style: Style,
    out: String,
    charged: usize,
}

impl Writer<'_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(wrong("tojson: the value is nested too deeply"));
        }
        if self.out.len() - self.charged >= CHARGE_BYTES {
            self.state.consume_fuel(((self.out.len() - self.charged) / 64) as u64)?;
            self.charged = self.out.len();
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<Value>>();
                self.out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.before_item(index, depth);
                    self.value(item, depth + 1)?;
                }
                self.end(items.is_empty(), depth, ']');
            }
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(wrong(format!("tojson: a value of kind {kind} is not JSON"))),
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys = value.try_iter()?.collect::<Vec<Value>>();
        if self.style.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.before_item(index, depth);
            match key.kind() {
                ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                ValueKind::Bool | ValueKind::Number | ValueKind::None => {
                    self.out.push('"');
                    self.value(key, depth)?;
                    self.out.push('"');
                }
                kind => return Err(wrong(format!("tojson: a key of kind {kind} is not JSON"))),
            }
            self.out.push_str(&self.style.key_separator);
            self.value(&value.get_item(key)?, depth + 1)?;
        }
        self.end(keys.is_empty(), depth, '}');
        Ok(())
    }

    fn before_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.style.item_separator);
        }
        self.line(depth + 1);
    }

    fn end(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            let _ = write!(self.out, "{value}");
            return Ok(());
        }
        let float = f64::try_from(value.clone())?;
        self.out.push_str(&float_repr(float));
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.style.ensure_ascii && !c.is_ascii() && !is_stand_in(c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's repr of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub fn float_repr(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_string();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_string();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}
