//! The Jinja dialect of chat templates: minijinja set up like the sandboxed environment of transformers, with a budget
//! of work and of output for every rendering.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use regex::Regex;
use std::sync::LazyLock;

use crate::fault::{excerpt, Fallible, Fault};
use crate::meter;
use crate::pyjson::tojson;

/// A rendering may take this many steps, plus some for every byte it is given. minijinja counts one step per instruction
/// and per 64 bytes of string work. The templates of known models take up to 250 steps per message; templates that walk
/// all messages for each message must get through a thousand of them too.
pub const BASE_STEPS: u64 = 5_000_000;
pub const STEPS_PER_INPUT: u64 = 4;
pub const MAX_STEPS: u64 = 50_000_000;
/// A rendering may put out this much, plus some bytes for every byte it is given.
pub const BASE_OUTPUT: usize = 1 << 20;
pub const OUTPUT_PER_INPUT: usize = 8;
pub const MAX_OUTPUT: usize = 256 << 20;
/// A rendering may hold this much memory, plus some for every byte it is given.
pub const BASE_MEMORY: usize = 64 << 20;
pub const MEMORY_PER_INPUT: usize = 32;
/// Enough for the recursion that minijinja allows (500 levels), whatever stack the caller has.
pub const STACK_BYTES: usize = 16 << 20;
/// A template file larger than this is no chat template.
pub const MAX_TEMPLATE: usize = 4 << 20;

/// The error that a template raises itself; kept apart to give the user its words without ours.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}
impl std::error::Error for Raised {}

fn raise_exception(message: Value) -> Result<Value, Error> {
    let text = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Raised(text)))
}

/// The local time in the format of C's strftime, as Python's datetime gives it.
fn strftime_now(format: String) -> Result<String, Error> {
    const MAX_FORMAT: usize = 256;
    let wrong =
        || Error::new(ErrorKind::InvalidOperation, "strftime_now: the format is empty, too long or holds a NUL");
    let spec = std::ffi::CString::new(format.as_str()).map_err(|_| wrong())?;
    if format.is_empty() || format.len() > MAX_FORMAT {
        return Err(wrong());
    }
    let mut buffer = [0u8; 16 * MAX_FORMAT];
    // SAFETY: time and localtime_r write only to `now` and `parts`; strftime writes at most buffer.len() bytes of
    // `buffer` and reads `spec`, which ends in a NUL.
    let written = unsafe {
        let mut parts: libc::tm = std::mem::zeroed();
        let now = libc::time(std::ptr::null_mut());
        libc::localtime_r(&now, &mut parts);
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), spec.as_ptr(), &parts)
    };
    Ok(String::from_utf8_lossy(&buffer[..written]).into_owned())
}

fn strings<const N: usize>(args: &[Value]) -> Result<[&str; N], Error> {
    let found: Vec<&str> = args.iter().filter_map(Value::as_str).collect();
    <[&str; N]>::try_from(found).map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("expected {N} strings")))
}

/// Python's string methods that minijinja-contrib lacks and templates use.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str()) {
        let three = |head: &str, separator: &str, tail: &str| -> Value {
            [head, separator, tail].into_iter().map(Value::from).collect()
        };
        match method {
            "removeprefix" => {
                let [prefix] = strings(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let [suffix] = strings(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" => {
                let [separator] = strings(args)?;
                return Ok(match text.split_once(separator) {
                    Some((head, tail)) => three(head, separator, tail),
                    None => three(text, "", ""),
                });
            }
            "rpartition" => {
                let [separator] = strings(args)?;
                return Ok(match text.rsplit_once(separator) {
                    Some((head, tail)) => three(head, separator, tail),
                    None => three("", "", text),
                });
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn tojson_filter(state: &State, value: Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    tojson(state, value, positional.first().cloned(), kwargs)
}

/// Python's idea of a sequence: strings and mappings have a length and items too, and undefined values pretend to.
fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

pub fn new_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the default delimiters are valid"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.add_filter("tojson", tojson_filter);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// `{% generation %}` … `{% endgeneration %}` marks the model's own words for training and prints its body unchanged. An
/// always-true `if` does the same and keeps the whitespace rules of the tags.
pub fn strip_generation_tags(source: &str) -> String {
    static OPEN: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*generation\s*([-+]?)%\}").expect("a constant pattern"));
    static CLOSE: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}").expect("a constant pattern"));
    let opened = OPEN.replace_all(source, "{%$1 if true $2%}");
    CLOSE.replace_all(&opened, "{%$1 endif $2%}").into_owned()
}

struct Sink {
    bytes: Vec<u8>,
    limit: usize,
    overflowed: bool,
}

impl std::io::Write for Sink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + data.len() > self.limit {
            self.overflowed = true;
            return Err(std::io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Renders one template of `environment`; `input_bytes` is the size of the request, which the limits grow with.
/// `Ok(None)`: the template wanted more memory than it may have and must not be run again.
pub fn render(
    environment: &Environment<'static>,
    name: &str,
    context: Value,
    input_bytes: usize,
) -> Fallible<Option<String>> {
    let steps = BASE_STEPS.saturating_add((input_bytes as u64).saturating_mul(STEPS_PER_INPUT)).min(MAX_STEPS);
    let limit = BASE_OUTPUT.saturating_add(input_bytes.saturating_mul(OUTPUT_PER_INPUT)).min(MAX_OUTPUT);
    let memory = BASE_MEMORY.saturating_add(input_bytes.saturating_mul(MEMORY_PER_INPUT));
    let mut environment = environment.clone();
    environment.set_fuel(Some(steps));
    let name = name.to_string();
    let rendered = meter::run(memory, STACK_BYTES, move || render_within(&environment, &name, context, steps, limit));
    match rendered {
        Ok(Some(result)) => result.map(Some),
        Ok(None) => Ok(None),
        Err(error) => Err(Fault::internal(format!("no thread for the chat template: {error}"))),
    }
}

fn render_within(
    environment: &Environment<'static>,
    name: &str,
    context: Value,
    steps: u64,
    limit: usize,
) -> Fallible<String> {
    let template = environment.get_template(name).map_err(|error| Fault::internal(error.to_string()))?;
    let mut sink = Sink { bytes: Vec::new(), limit, overflowed: false };
    let result = template.render_captured_to(context, &mut sink).map(|_| ());
    if sink.overflowed {
        return Err(Fault::invalid(format!("the chat template puts out more than {limit} bytes")));
    }
    result.map_err(|error| describe(&error, steps))?;
    String::from_utf8(sink.bytes).map_err(|_| Fault::internal("the chat template's output is not UTF-8"))
}

fn describe(error: &Error, steps: u64) -> Fault {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return Fault::invalid(excerpt(&raised.0, 500));
        }
        if current.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return Fault::invalid(format!("the chat template takes more than {steps} steps"));
        }
        cause = current.source();
    }
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    Fault::invalid(format!("the chat template cannot render these messages: {}{line}", message_of(error)))
}

fn message_of(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {}", error.kind(), excerpt(detail, 300)),
        None => error.kind().to_string(),
    }
}

/// Compiles a template under `name`.
pub fn add_template(environment: &mut Environment<'static>, name: &str, source: &str) -> Fallible<()> {
    if source.len() > MAX_TEMPLATE {
        return Err(Fault::bad_file(format!("chat_template: {} bytes, the limit is {MAX_TEMPLATE}", source.len())));
    }
    environment.add_template_owned(name.to_string(), strip_generation_tags(source)).map_err(|error| {
        let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
        Fault::bad_file(format!("chat_template \"{}\": {line}{}", excerpt(name, 40), message_of(&error)))
    })
}
