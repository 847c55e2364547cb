//! From messages to the prompt: the request's JSON becomes the template's context, and the rendered text becomes token ids
//! in which control tokens come from the template alone.

use minijinja::value::Value;
use minijinja::Environment;
use regex::Regex;
use serde_json::{Map, Value as Json};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use crate::added::UserSpans;
use crate::config::TokenizerConfig;
use crate::engine;
use crate::fault::{excerpt, Fallible, Fault};
use crate::guard::{Guard, Watch};
use crate::merge::Limits;
use crate::tokenizer::Tokenizer;

/// A model has one to five named templates.
const MAX_TEMPLATES: usize = 16;
const MAX_ROLE_CHARS: usize = 64;
/// transformers marks the end of the message to continue by a word and a space; whether the space survives tells if the
/// template trims.
const CONTINUE_SPACE: char = ' ';
/// The names under which a message's reasoning is passed; the first is the one that templates read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

pub struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    sources: Vec<String>,
    specials: Vec<(String, String)>,
    extra_specials: Vec<String>,
    /// Whether a template asks if `content` is none: only then is a null content kept (see `drop_nulls`).
    asks_for_null_content: bool,
    tokenizer: Arc<Tokenizer>,
    watch: Watch,
    /// Set once a rendering ran out of memory.
    exhausted: AtomicBool,
}

pub struct ChatRequest<'a> {
    pub messages: &'a str,
    /// JSON list, or empty.
    pub tools: &'a str,
    /// JSON object of chat_template_kwargs, or empty.
    pub kwargs: &'a str,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
}

struct Parsed {
    messages: Vec<Json>,
    tools: Option<Vec<Json>>,
    kwargs: Map<String, Json>,
}

fn parse_request(request: &ChatRequest) -> Fallible<Parsed> {
    let parse = |name: &str, text: &str| -> Fallible<Option<Json>> {
        if text.trim().is_empty() {
            return Ok(None);
        }
        let json: Json =
            serde_json::from_str(text).map_err(|error| Fault::invalid(format!("{name}: not valid JSON: {error}")))?;
        Ok(Some(json).filter(|json| !json.is_null()))
    };
    let messages = match parse("messages", request.messages)? {
        Some(Json::Array(messages)) if messages.iter().all(Json::is_object) => messages,
        _ => return Err(Fault::invalid("messages: must be a list of objects")),
    };
    if messages.is_empty() {
        return Err(Fault::invalid("messages: must hold at least one message"));
    }
    let tools = match parse("tools", request.tools)? {
        None => None,
        Some(Json::Array(tools)) if tools.is_empty() => None,
        Some(Json::Array(tools)) if tools.iter().all(Json::is_object) => Some(tools),
        Some(_) => return Err(Fault::invalid("tools: must be a list of objects")),
    };
    let kwargs = match parse("chat_template_kwargs", request.kwargs)? {
        None => Map::new(),
        Some(Json::Object(kwargs)) => kwargs,
        Some(_) => return Err(Fault::invalid("chat_template_kwargs: must be an object")),
    };
    for reserved in ["messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"] {
        if kwargs.contains_key(reserved) {
            return Err(Fault::invalid(format!("chat_template_kwargs: \"{reserved}\" cannot be set here")));
        }
    }
    if request.add_generation_prompt && request.continue_final_message {
        return Err(Fault::invalid("add_generation_prompt and continue_final_message exclude each other"));
    }
    Ok(Parsed { messages, tools, kwargs })
}

/// A role is often part of the template's own control text, so it is passed as it is and must be a plain name.
fn check_role(message: &Json) -> Fallible<()> {
    let plain = |c: char| c.is_alphanumeric() || c == '_' || c == '-' || c == '.';
    match message.get("role") {
        None => Ok(()),
        Some(Json::String(role)) if role.chars().all(plain) && role.chars().count() <= MAX_ROLE_CHARS => Ok(()),
        Some(role) => {
            Err(Fault::invalid(format!("messages: {} is not a role", excerpt(&role.to_string(), MAX_ROLE_CHARS))))
        }
    }
}

/// Python's rendering drops message keys that are null (clients send `"tool_calls": null`), and gives reasoning under the
/// name that templates read.
fn normalize_message(message: &mut Json, keep_null_content: bool) {
    let Some(fields) = message.as_object_mut() else { return };
    fields.retain(|key, value| !value.is_null() || (keep_null_content && key == "content"));
    let Some(reasoning) = REASONING_FIELDS.iter().find_map(|field| fields.get(*field).cloned()) else { return };
    fields.entry("thinking").or_insert_with(|| reasoning.clone());
    fields.insert("reasoning_content".to_string(), reasoning);
}

/// Appends `mark` to the text that the model is to continue.
fn mark_final_message(messages: &mut [Json], mark: &str) -> Fallible<()> {
    let content = messages.last_mut().and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    match text {
        Some(text) => {
            text.push_str(mark);
            Ok(())
        }
        None => Err(Fault::invalid("continue_final_message: the final message has no text to continue")),
    }
}

fn cut_at_mark(rendered: &mut String, mark: &str) -> Fallible<()> {
    let bare = mark.trim_end();
    let Some(at) = rendered.rfind(bare) else {
        return Err(Fault::invalid("continue_final_message: the chat template does not show the final message's end"));
    };
    let kept_space = rendered[at..].starts_with(mark);
    rendered.truncate(at);
    if !kept_space {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(())
}

fn visit_strings(json: &Json, visit: &mut dyn FnMut(&str)) {
    match json {
        Json::String(text) => visit(text),
        Json::Array(items) => items.iter().for_each(|item| visit_strings(item, visit)),
        Json::Object(fields) => fields.iter().for_each(|(key, value)| {
            visit(key);
            visit_strings(value, visit);
        }),
        _ => {}
    }
}

/// JSON to a template value, with every string and key put through `protect`.
fn to_value(json: &Json, protect: &dyn Fn(&str) -> String) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(signed), _) => Value::from(signed),
            (None, Some(unsigned)) => Value::from(unsigned),
            (None, None) => Value::from(number.as_f64().unwrap_or(0.0)),
        },
        Json::String(text) => Value::from(protect(text)),
        Json::Array(items) => Value::from(items.iter().map(|item| to_value(item, protect)).collect::<Vec<Value>>()),
        Json::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (Value::from(protect(key)), to_value(value, protect))))
        }
    }
}

impl ChatTemplate {
    /// `jinja` is the chat_template.jinja file and wins over the field of tokenizer_config.json; `Ok(None)` if there is
    /// neither.
    pub fn new(tokenizer: Arc<Tokenizer>, config_json: &str, jinja: &str) -> Fallible<Option<ChatTemplate>> {
        let config = TokenizerConfig::parse(config_json)?;
        let templates = match jinja.is_empty() {
            false => vec![("default".to_string(), jinja.to_string())],
            true => config.templates,
        };
        if templates.is_empty() {
            return Ok(None);
        }
        if templates.len() > MAX_TEMPLATES {
            return Err(Fault::bad_file(format!(
                "chat_template: {} named templates, the limit is {MAX_TEMPLATES}",
                templates.len()
            )));
        }
        let mut environment = engine::new_environment();
        for (name, source) in &templates {
            engine::add_template(&mut environment, name, source)?;
        }
        static NULL_TEST: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r#"\bcontent['"]?\]?\s+is\s+(?:not\s+)?none\b"#).expect("a constant pattern"));
        let (names, sources): (Vec<String>, Vec<String>) = templates.into_iter().unzip();
        let watch = Watch::new(tokenizer.added(), &sources.iter().map(String::as_str).collect::<Vec<&str>>())?;
        Ok(Some(ChatTemplate {
            environment,
            asks_for_null_content: sources.iter().any(|source| NULL_TEST.is_match(source)),
            names,
            sources,
            specials: config.specials,
            extra_specials: config.extra_specials,
            tokenizer,
            watch,
            exhausted: AtomicBool::new(false),
        }))
    }

    /// The template for this request: one named "tool_use" if there are tools, else "default".
    fn choose(&self, has_tools: bool) -> Fallible<&str> {
        let find = |wanted: &str| self.names.iter().find(|name| *name == wanted).map(String::as_str);
        let chosen = if has_tools { find("tool_use").or_else(|| find("default")) } else { find("default") };
        chosen.ok_or_else(|| {
            Fault::unsupported(format!("the model has chat templates {:?}, but no \"default\"", self.names))
        })
    }

    /// The prompt as text.
    pub fn render(&self, request: &ChatRequest) -> Fallible<String> {
        Ok(self.render_guarded(request)?.0)
    }

    /// The prompt as token ids and as text. Control tokens in it come from the template only.
    pub fn encode(&self, request: &ChatRequest, limits: &Limits) -> Fallible<(Vec<u32>, String)> {
        let (text, spans) = self.render_guarded(request)?;
        let ids = self.tokenizer.encode_spans(&text, &UserSpans::Ranges(spans), limits)?;
        Ok((ids, text))
    }

    /// The rendered text, and the bytes of it that must not take part in a control token.
    fn render_guarded(&self, request: &ChatRequest) -> Fallible<(String, Vec<Range<usize>>)> {
        let mut parsed = parse_request(request)?;
        for message in &mut parsed.messages {
            check_role(message)?;
            normalize_message(message, self.asks_for_null_content);
        }
        let guard = Guard::new(&self.watch, |visit| {
            parsed.messages.iter().for_each(|message| visit_strings(message, visit));
            parsed.tools.iter().flatten().for_each(|tool| visit_strings(tool, visit));
            parsed.kwargs.values().for_each(|value| visit_strings(value, visit));
            self.sources.iter().for_each(|source| visit(source));
        })?;
        let mark = format!("{}{CONTINUE_SPACE}", guard.end_mark);
        if request.continue_final_message {
            mark_final_message(&mut parsed.messages, &mark)?;
        }
        let name = self.choose(parsed.tools.is_some())?;
        let context = self.context(request, &parsed, &|text| guard.protect(text));
        let input_bytes = request.messages.len() + request.tools.len() + request.kwargs.len();
        let too_large = || Fault::invalid("the chat template takes too much memory; it is not run any more");
        if self.exhausted.load(Ordering::Relaxed) {
            return Err(too_large());
        }
        let rendered = engine::render(&self.environment, name, context, input_bytes)?;
        let Some(mut rendered) = rendered else {
            self.exhausted.store(true, Ordering::Relaxed);
            return Err(too_large());
        };
        if request.continue_final_message {
            cut_at_mark(&mut rendered, &mark)?;
        }
        Ok(guard.restore(&rendered))
    }

    fn context(&self, request: &ChatRequest, parsed: &Parsed, protect: &dyn Fn(&str) -> String) -> Value {
        let list =
            |items: &[Json]| Value::from(items.iter().map(|item| to_value(item, protect)).collect::<Vec<Value>>());
        let mut fields: Vec<(String, Value)> = Vec::new();
        for (name, content) in &self.specials {
            fields.push((name.clone(), Value::from(content.as_str())));
        }
        if !self.extra_specials.is_empty() {
            let extra = self.extra_specials.iter().map(|content| Value::from(content.as_str())).collect::<Vec<Value>>();
            fields.push(("additional_special_tokens".to_string(), Value::from(extra)));
        }
        for (name, value) in &parsed.kwargs {
            fields.push((name.clone(), to_value(value, protect)));
        }
        fields.push(("messages".to_string(), list(&parsed.messages)));
        fields.push(("tools".to_string(), parsed.tools.as_deref().map_or(Value::from(()), list)));
        if !parsed.kwargs.contains_key("documents") {
            fields.push(("documents".to_string(), Value::from(())));
        }
        fields.push(("add_generation_prompt".to_string(), Value::from(request.add_generation_prompt)));
        Value::from_pairs(fields)
    }
}
