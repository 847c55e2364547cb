//! tokenizer_config.json: which tokens are special, whether BOS and EOS are added, and the chat templates.

use serde_json::Value;
use tokenizers::AddedToken;

use crate::fault::{Fallible, Fault};

/// The named special tokens a template can see, in the order transformers knows them.
pub const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

#[derive(Default)]
pub struct TokenizerConfig {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub unk: Option<String>,
    /// (name, content) of the special tokens that are set.
    pub specials: Vec<(String, String)>,
    pub extra_specials: Vec<String>,
    /// added_tokens_decoder, ascending by id.
    pub added_tokens: Vec<(u32, AddedToken)>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    /// (name, source); a single template has the name "default".
    pub templates: Vec<(String, String)>,
}

/// A special token is written as a string or as an object with a `content`.
fn token_content(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    (!text.is_empty()).then(|| text.to_string())
}

fn wrong(key: &str, expected: &str) -> Fault {
    Fault::bad_file(format!("tokenizer_config.json: {key} must be {expected}"))
}

/// `Some` if the key is there at all: transformers builds its own post-processor then, and null counts as false.
fn flag(config: &Value, key: &str) -> Fallible<Option<bool>> {
    match config.get(key) {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(false)),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => Err(wrong(key, "true or false")),
    }
}

fn parse_added_tokens(config: &Value) -> Fallible<Vec<(u32, AddedToken)>> {
    let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(Vec::new()) };
    let mut tokens = Vec::new();
    for (key, value) in decoder {
        let id: u32 = key.parse().map_err(|_| wrong("added_tokens_decoder", "keyed by token ids"))?;
        let content =
            token_content(value).ok_or_else(|| wrong("added_tokens_decoder", "made of tokens with content"))?;
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
        let token = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        tokens.push((id, token));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens)
}

fn parse_templates(config: &Value) -> Fallible<Vec<(String, String)>> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![("default".to_string(), source.clone())]),
        Some(Value::Array(list)) => list
            .iter()
            .map(|entry| {
                let field = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_string);
                match (field("name"), field("template")) {
                    (Some(name), Some(template)) => Ok((name, template)),
                    _ => Err(wrong("chat_template", "a list of objects with name and template")),
                }
            })
            .collect(),
        Some(_) => Err(wrong("chat_template", "a string or a list")),
    }
}

impl TokenizerConfig {
    /// An empty text is an empty configuration: not every model has the file.
    pub fn parse(json: &str) -> Fallible<TokenizerConfig> {
        if json.trim().is_empty() {
            return Ok(TokenizerConfig::default());
        }
        let config: Value =
            serde_json::from_str(json).map_err(|error| Fault::bad_file(format!("tokenizer_config.json: {error}")))?;
        if !config.is_object() {
            return Err(Fault::bad_file("tokenizer_config.json: must be an object"));
        }
        let named = |name: &str| config.get(name).and_then(token_content);
        let mut extra_specials = Vec::new();
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            match config.get(key) {
                Some(Value::Array(list)) => extra_specials.extend(list.iter().filter_map(token_content)),
                Some(Value::Object(map)) => extra_specials.extend(map.values().filter_map(token_content)),
                _ => {}
            }
        }
        Ok(TokenizerConfig {
            bos: named("bos_token"),
            eos: named("eos_token"),
            unk: named("unk_token"),
            specials: SPECIAL_NAMES.iter().filter_map(|name| Some((name.to_string(), named(name)?))).collect(),
            extra_specials,
            added_tokens: parse_added_tokens(&config)?,
            add_bos: flag(&config, "add_bos_token")?,
            add_eos: flag(&config, "add_eos_token")?,
            templates: parse_templates(&config)?,
        })
    }

    pub fn special_contents(&self) -> impl Iterator<Item = &str> {
        self.specials.iter().map(|(_, content)| content.as_str()).chain(self.extra_specials.iter().map(String::as_str))
    }

    /// (add BOS, add EOS) if the file decides it; otherwise the post-processor of tokenizer.json does.
    pub fn explicit_bos_eos(&self) -> Option<(bool, bool)> {
        match (self.add_bos, self.add_eos) {
            (None, None) => None,
            (bos, eos) => Some((bos.unwrap_or(false), eos.unwrap_or(false))),
        }
    }
}
