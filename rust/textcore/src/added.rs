//! Finding added tokens (`<|im_start|>`, `<think>` …) in text, the way the `tokenizers` library does it, with one
//! difference: each match is checked against the spans of the text that a user wrote. A control token is only ever
//! recognised where the chat template wrote it; inside a user's span the same characters stay ordinary text.

use ahash::AHashMap;
use daachorse::{DoubleArrayAhoCorasick, DoubleArrayAhoCorasickBuilder, MatchKind};
use regex::Regex;
use std::ops::Range;
use std::sync::LazyLock;
use tokenizers::{AddedToken, NormalizedString, Normalizer};

use crate::fault::{Fallible, Fault};

/// Which bytes of a text come from a user.
pub enum UserSpans {
    /// All of it: no control token may be found anywhere.
    All,
    /// These byte ranges, ascending and disjoint.
    Ranges(Vec<Range<usize>>),
}

impl UserSpans {
    pub fn touches(&self, start: usize, end: usize) -> bool {
        match self {
            UserSpans::All => true,
            UserSpans::Ranges(ranges) => {
                let first = ranges.partition_point(|range| range.end <= start);
                ranges.get(first).is_some_and(|range| range.start < end)
            }
        }
    }

    /// The same for the part `part` of the text, counted from its start.
    pub fn within(&self, part: Range<usize>) -> UserSpans {
        match self {
            UserSpans::All => UserSpans::All,
            UserSpans::Ranges(ranges) => {
                let inside = ranges.iter().filter(|range| range.start < part.end && range.end > part.start);
                let moved =
                    inside.map(|range| range.start.max(part.start) - part.start..range.end.min(part.end) - part.start);
                UserSpans::Ranges(moved.collect())
            }
        }
    }
}

pub struct Added {
    pub token: AddedToken,
    pub control: bool,
}

type Matcher = Option<DoubleArrayAhoCorasick<u32>>;

/// A piece of text: an added token's id, or `None` for text that the model tokenizes.
pub type Piece = (Option<u32>, Range<usize>);

pub struct AddedTokens {
    by_id: AHashMap<u32, Added>,
    /// Tokens looked for in the text as it is, and those looked for after normalisation.
    raw: Matcher,
    normalized: Matcher,
}

/// A control token steers the conversation: whoever can write one can forge a turn. Files flag most of them as special,
/// but not all (DeepSeek's role marks `<｜User｜>` are not flagged), so the usual `<|…|>` shape counts as well.
pub fn is_control(token: &AddedToken) -> bool {
    let barred = |open: &str, close: &str| {
        token.content.len() > open.len() + close.len()
            && token.content.starts_with(open)
            && token.content.ends_with(close)
    };
    token.special || barred("<|", "|>") || barred("<｜", "｜>")
}

fn build_matcher(patterns: Vec<(String, u32)>) -> Fallible<Matcher> {
    if patterns.is_empty() {
        return Ok(None);
    }
    DoubleArrayAhoCorasickBuilder::new()
        .match_kind(MatchKind::LeftmostLongest)
        .build_with_values(patterns)
        .map(Some)
        .map_err(|error| Fault::bad_file(format!("tokenizer.json: added tokens cannot be searched for: {error}")))
}

fn is_word(c: Option<char>) -> bool {
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^\w$").expect("a constant pattern"));
    c.is_some_and(|c| WORD.is_match(c.encode_utf8(&mut [0; 4])))
}

impl AddedTokens {
    pub fn new<N: Normalizer>(tokens: AHashMap<u32, AddedToken>, normalizer: Option<&N>) -> Fallible<AddedTokens> {
        let mut raw = Vec::new();
        let mut normalized = Vec::new();
        let mut by_id = AHashMap::new();
        for (id, token) in tokens {
            if token.normalized {
                let mut pattern = NormalizedString::from(token.content.as_str());
                if let Some(normalizer) = normalizer {
                    normalizer.normalize(&mut pattern).map_err(|error| {
                        Fault::bad_file(format!("tokenizer.json: added token {id} cannot be normalised: {error}"))
                    })?;
                }
                normalized.push((pattern.get().to_string(), id));
            } else {
                raw.push((token.content.clone(), id));
            }
            by_id.insert(id, Added { control: is_control(&token), token });
        }
        Ok(AddedTokens { by_id, raw: build_matcher(raw)?, normalized: build_matcher(normalized)? })
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, &Added)> {
        self.by_id.iter().map(|(id, added)| (*id, added))
    }

    pub fn get(&self, id: u32) -> Option<&Added> {
        self.by_id.get(&id)
    }

    /// Whether a control token is looked for in normalised text.
    pub fn has_normalized_control(&self) -> bool {
        self.by_id.values().any(|added| added.control && added.token.normalized)
    }

    /// Splits un-normalised `text` at the added tokens that are matched before normalisation.
    /// `allow(start, end)` says whether a control token may stand at these bytes of `text`.
    pub fn split_raw(&self, text: &str, allow: impl Fn(usize, usize, &str) -> bool) -> Vec<Piece> {
        self.split(text, &self.raw, allow)
    }

    /// The same for the tokens that are matched in normalised text.
    pub fn split_normalized(&self, text: &str, allow: impl Fn(usize, usize, &str) -> bool) -> Vec<Piece> {
        self.split(text, &self.normalized, allow)
    }

    fn split(&self, text: &str, matcher: &Matcher, allow: impl Fn(usize, usize, &str) -> bool) -> Vec<Piece> {
        let Some(matcher) = matcher else {
            return vec![(None, 0..text.len())];
        };
        let mut pieces: Vec<Piece> = Vec::new();
        let mut done = 0;
        for found in matcher.leftmost_find_iter(text) {
            let (mut start, mut end) = (found.start(), found.end());
            let added = &self.by_id[&found.value()];
            if added.control && !allow(start, end, &added.token.content) {
                continue;
            }
            if added.token.single_word
                && (is_word(text[..start].chars().next_back()) || is_word(text[end..].chars().next()))
            {
                continue;
            }
            // The previous token's rstrip may have taken the whitespace that this match begins with.
            start = start.max(done);
            end = end.max(done);
            if added.token.lstrip {
                start = done + text[done..start].trim_end().len();
            }
            if added.token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start {
                pieces.push((None, done..start));
            }
            pieces.push((Some(found.value()), start..end));
            done = end;
        }
        if done < text.len() {
            pieces.push((None, done..text.len()));
        }
        pieces
    }
}
