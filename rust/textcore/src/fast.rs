//! Encoding without the library's offset bookkeeping, for the make of nearly all byte-level BPE tokenizers: no normaliser
//! or NFC, regular-expression splits, then the byte-level alphabet. The result is the library's, several times sooner.
//!
//! The usual split pattern ends in `\s+(?!\S)|\s+`, and only that look-ahead needs a backtracking engine. It says: of a
//! run of whitespace before other text, leave the last character to the next word. So the run is matched by plain `\s+`
//! as a second pattern of lower priority, and the last character is given back; all else runs as an automaton.

use ahash::AHashMap;
use regex_automata::{meta, Anchored, Input};
use serde_json::Value;
use std::borrow::Cow;
use std::sync::RwLock;
use tokenizers::{ModelWrapper, Tokenizer as Library};
use unicode_normalization_alignments::{is_nfc_quick, IsNormalized, UnicodeNormalization};

use crate::fault::{Fallible, Fault};
use crate::merge::{Limits, Merger};
use crate::pieces::BYTE_CHARS;

const WHITESPACE_TAIL: &str = r"|\s+(?!\S)|\s+";
/// The split that ByteLevel makes when it is told to use its own.
const BYTE_LEVEL_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Backtracking steps per match for patterns that need a backtracking engine. A run of a million spaces takes one
/// million; a pattern that needs more than this is an error instead of a hang.
const MAX_BACKTRACKS: usize = 1 << 26;
/// Words are remembered with their ids. English has about 50,000 distinct words in a megabyte.
const MAX_CACHED_WORDS: usize = 1 << 16;
const MAX_CACHED_WORD_BYTES: usize = 64;
/// Longer words are merged here and not by the library, which needs a microsecond per byte and cannot be stopped.
const LONG_WORD_BYTES: usize = 4096;
/// The longest text that the library is given where only it can take it: a second's work.
pub const MAX_LIBRARY_BYTES: usize = 4 << 20;
/// Words between two looks at the stop flag; with the library's longest usual word, some milliseconds.
const WORDS_PER_LOOK: usize = 1 << 10;

enum Splitter {
    Automaton(meta::Regex),
    Backtracking(fancy_regex::Regex),
}

pub struct FastPath {
    nfc: bool,
    splitters: Vec<Splitter>,
    merger: Option<Merger>,
    cache: RwLock<AHashMap<Box<str>, Box<[u32]>>>,
}

/// Encodes one word, given in the byte-level alphabet.
type WordEncoder<'a> = &'a dyn Fn(&str, &mut Vec<u32>) -> Fallible<()>;

fn as_json<T: serde::Serialize>(part: Option<&T>) -> Value {
    part.and_then(|part| serde_json::to_value(part).ok()).unwrap_or(Value::Null)
}

/// `Some(true)` for NFC, `Some(false)` for no change, `None` for any other normaliser.
fn normalizer_is_nfc(normalizer: &Value) -> Option<bool> {
    match normalizer["type"].as_str() {
        None => normalizer.is_null().then_some(false),
        Some("NFC") => Some(true),
        Some("Sequence") => match normalizer["normalizers"].as_array()?.as_slice() {
            [] => Some(false),
            [single] => normalizer_is_nfc(single),
            _ => None,
        },
        Some(_) => None,
    }
}

/// The split patterns in order, or `None` if the pre-tokenizer is of another make.
fn split_patterns(pre_tokenizer: &Value) -> Option<Vec<String>> {
    let steps = match pre_tokenizer["type"].as_str()? {
        "Sequence" => pre_tokenizer["pretokenizers"].as_array()?.clone(),
        _ => vec![pre_tokenizer.clone()],
    };
    let (last, splits) = steps.split_last()?;
    let mut patterns = Vec::new();
    for split in splits {
        let plain = split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
        patterns.push(split["pattern"]["Regex"].as_str().filter(|_| plain)?.to_string());
    }
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    if last["use_regex"] != false {
        patterns.push(BYTE_LEVEL_PATTERN.to_string());
    }
    Some(patterns)
}

impl Splitter {
    fn new(pattern: &str) -> Fallible<Splitter> {
        let automaton = match pattern.strip_suffix(WHITESPACE_TAIL) {
            Some(head) => meta::Regex::new_many(&[head, r"\s+"]),
            None => meta::Regex::new(pattern),
        };
        if let Ok(regex) = automaton {
            return Ok(Splitter::Automaton(regex));
        }
        fancy_regex::RegexBuilder::new(pattern)
            .backtrack_limit(MAX_BACKTRACKS)
            .build()
            .map(Splitter::Backtracking)
            .map_err(|error| Fault::bad_file(format!("tokenizer.json: pre_tokenizer pattern: {error}")))
    }

    /// Calls `visit` with consecutive pieces of `text`: the matches, and what lies between them.
    fn split(&self, text: &str, visit: &mut dyn FnMut(&str) -> Fallible<()>) -> Fallible<()> {
        match self {
            Splitter::Automaton(regex) => split_by_automaton(regex, text, visit),
            Splitter::Backtracking(regex) => {
                let mut done = 0;
                for found in regex.find_iter(text) {
                    let found = found.map_err(|_| {
                        Fault::invalid("the text cannot be tokenized: the split pattern backtracks too long on it")
                    })?;
                    visit(&text[done..found.start()])?;
                    visit(found.as_str())?;
                    done = found.end();
                }
                visit(&text[done..])
            }
        }
    }
}

fn split_by_automaton(regex: &meta::Regex, text: &str, visit: &mut dyn FnMut(&str) -> Fallible<()>) -> Fallible<()> {
    let mut done = 0;
    while done < text.len() {
        // These patterns nearly always match where the last match ended, and an anchored search costs half.
        let anchored = Input::new(text).range(done..).anchored(Anchored::Yes);
        let found = regex.search(&anchored).or_else(|| regex.search(&Input::new(text).range(done..)));
        let Some(found) = found else { break };
        let mut end = found.end();
        let whitespace_tail = found.pattern().as_usize() == 1;
        if whitespace_tail && end < text.len() {
            let last = text[found.start()..end].chars().next_back().map_or(0, char::len_utf8);
            if end - last > found.start() {
                end -= last;
            }
        }
        if end == done {
            // An empty match: step over one character, which stays with the text between matches.
            let step = text[done..].chars().next().map_or(1, char::len_utf8);
            visit(&text[done..done + step])?;
            done += step;
            continue;
        }
        visit(&text[done..found.start()])?;
        visit(&text[found.start()..end])?;
        done = end;
    }
    visit(&text[done..])
}

/// Refuses what would keep the library busy for longer than a moment.
pub fn check_library_bytes(bytes: usize) -> Fallible<()> {
    if bytes <= MAX_LIBRARY_BYTES {
        return Ok(());
    }
    Err(Fault::invalid(format!(
        "the text has {bytes} bytes that this model's tokenizer must take as one piece, the limit is \
         {MAX_LIBRARY_BYTES}; shorten it"
    )))
}

impl FastPath {
    /// `None` if the tokenizer is of another make; the library encodes then.
    pub fn detect(library: &Library, is_control: impl Fn(u32) -> bool) -> Fallible<Option<FastPath>> {
        if !matches!(library.get_model(), ModelWrapper::BPE(_)) {
            return Ok(None);
        }
        let Some(nfc) = normalizer_is_nfc(&as_json(library.get_normalizer())) else { return Ok(None) };
        let Some(patterns) = split_patterns(&as_json(library.get_pre_tokenizer())) else { return Ok(None) };
        let splitters = patterns.iter().map(|pattern| Splitter::new(pattern)).collect::<Fallible<Vec<_>>>()?;
        let merger = Merger::detect(library, is_control)?;
        Ok(Some(FastPath { nfc, splitters, merger, cache: RwLock::new(AHashMap::new()) }))
    }

    /// No token stands for more bytes of normalised text than this, if that is certain.
    pub fn longest_token_bytes(&self) -> Option<usize> {
        self.merger.as_ref().map(|merger| merger.longest_token_bytes)
    }

    /// The text as the normaliser leaves it.
    pub fn normalize<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if !self.nfc || text.is_ascii() || matches!(is_nfc_quick(text.chars()), IsNormalized::Yes) {
            return Cow::Borrowed(text);
        }
        Cow::Owned(text.nfc().map(|(c, _)| c).collect())
    }

    /// Encodes normalised text without added tokens.
    pub fn encode(&self, text: &str, encode_word: WordEncoder, limits: &Limits, ids: &mut Vec<u32>) -> Fallible<()> {
        let mut learned: AHashMap<Box<str>, Box<[u32]>> = AHashMap::new();
        {
            // Contended or poisoned: go on without the cache, the result is the same.
            let cache = self.cache.try_read().ok();
            let mut spelled = String::new();
            let mut words = 0;
            self.split(0, text, &mut |word| {
                words += 1;
                if words % WORDS_PER_LOOK == 0 {
                    limits.check_stop()?;
                }
                let cached = cache.as_ref().and_then(|cache| cache.get(word)).or_else(|| learned.get(word));
                if let Some(cached) = cached {
                    ids.extend_from_slice(cached);
                    return Ok(());
                }
                if let Some(merger) = self
                    .merger
                    .as_ref()
                    .filter(|merger| word.len() >= LONG_WORD_BYTES && word.len() > merger.longest_token_bytes)
                {
                    return merger.encode(word.as_bytes(), limits, ids);
                }
                check_library_bytes(word.len())?;
                spelled.clear();
                spelled.extend(word.bytes().map(|byte| BYTE_CHARS[usize::from(byte)]));
                let start = ids.len();
                encode_word(&spelled, ids)?;
                if word.len() <= MAX_CACHED_WORD_BYTES && learned.len() < MAX_CACHED_WORDS {
                    learned.insert(word.into(), ids[start..].into());
                }
                Ok(())
            })?;
        }
        self.remember(learned);
        Ok(())
    }

    fn split(&self, level: usize, text: &str, visit: &mut dyn FnMut(&str) -> Fallible<()>) -> Fallible<()> {
        if text.is_empty() {
            return Ok(());
        }
        match self.splitters.get(level) {
            None => visit(text),
            Some(splitter) => splitter.split(text, &mut |piece| self.split(level + 1, piece, visit)),
        }
    }

    fn remember(&self, learned: AHashMap<Box<str>, Box<[u32]>>) {
        if learned.is_empty() {
            return;
        }
        let Ok(mut cache) = self.cache.try_write() else { return };
        if cache.len() + learned.len() > MAX_CACHED_WORDS {
            cache.clear();
        }
        cache.extend(learned);
    }
}
