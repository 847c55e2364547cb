//! Keeps message content from becoming control tokens on its way through a chat template.
//!
//! A rendered prompt is one string; who wrote which part of it is lost. So before rendering, the characters of the
//! request's strings that could begin or end a control token (usually `<` and `>`) are replaced by stand-ins: characters
//! of the private planes that occur nowhere in the request, drawn anew for every call. After rendering, each stand-in is
//! turned back and its place is known to be the user's; an added token that touches such a place is not recognised as
//! control. The replacement is one character for one, so lengths, slices, strip and split work as before. Tags that
//! templates look for in content (`</think>`, `<tool_response>`) are left alone: they are no control tokens, and no
//! control token can be put together from them without another marked character.

use ahash::AHashSet;
use daachorse::{DoubleArrayAhoCorasick, DoubleArrayAhoCorasickBuilder, MatchKind};
use regex::Regex;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::ops::Range;
use std::sync::LazyLock;

use crate::added::AddedTokens;
use crate::fault::{Fallible, Fault};

/// Private-use planes 15 and 16. Nobody has a reason to send these; the planes hold 131,068 characters.
const FIRST_STAND_IN: u32 = 0xF_0000;
const PLANE: u32 = 0x1_0000;
/// The last two code points of a plane are no characters.
const PER_PLANE: u32 = 0xFFFE;
const STAND_INS: u32 = 2 * PER_PLANE;
/// Tags of a template that stay as they are in content.
const MAX_TAGS: usize = 256;

pub fn is_stand_in(c: char) -> bool {
    c as u32 >= FIRST_STAND_IN
}

fn stand_in(index: u32) -> char {
    let index = index % STAND_INS;
    let code = FIRST_STAND_IN + (index / PER_PLANE) * PLANE + index % PER_PLANE;
    char::from_u32(code).expect("inside the planes")
}

type Search = Option<DoubleArrayAhoCorasick<u32>>;

/// What has to be known about a tokenizer and a template; made once.
pub struct Watch {
    /// Control tokens, overlapping matches.
    controls: Search,
    /// Tags to leave alone, leftmost-longest matches.
    tags: Search,
    /// Characters at the ends of control tokens.
    ends: Vec<char>,
    /// First characters of all control tokens; these may be letters and count only where a whole token stands.
    firsts: Vec<char>,
}

fn search(patterns: &[&str], kind: MatchKind) -> Fallible<Search> {
    if patterns.is_empty() {
        return Ok(None);
    }
    let pairs = patterns.iter().enumerate().map(|(index, pattern)| (*pattern, index as u32));
    DoubleArrayAhoCorasickBuilder::new()
        .match_kind(kind)
        .build_with_values(pairs)
        .map(Some)
        .map_err(|error| Fault::bad_file(format!("tokenizer.json: control tokens cannot be searched for: {error}")))
}

fn push_new(list: &mut Vec<char>, c: Option<char>) {
    list.extend(c.filter(|c| !list.contains(c)));
}

impl Watch {
    pub fn new(added: &AddedTokens, template_sources: &[&str]) -> Fallible<Watch> {
        let mut controls: Vec<&str> =
            added.iter().filter(|(_, token)| token.control).map(|(_, token)| token.token.content.as_str()).collect();
        controls.sort_unstable();
        controls.dedup();
        let (mut ends, mut firsts) = (Vec::new(), Vec::new());
        for control in &controls {
            let structural = |c: &char| !c.is_alphanumeric() && !c.is_whitespace();
            let (first, last) = (control.chars().next(), control.chars().next_back());
            push_new(&mut firsts, first);
            push_new(&mut ends, first.filter(structural));
            push_new(&mut ends, last.filter(structural));
            if !first.is_some_and(|c| structural(&c)) && !last.is_some_and(|c| structural(&c)) {
                // A token with letters at both ends: its first letter is watched everywhere.
                push_new(&mut ends, first);
            }
        }
        static TAG: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"</?[A-Za-z_][A-Za-z0-9_.-]*>").expect("a constant pattern"));
        let mut tags: AHashSet<&str> = AHashSet::new();
        for source in template_sources {
            tags.extend(TAG.find_iter(source).map(|tag| tag.as_str()).take(MAX_TAGS));
        }
        tags.extend(added.iter().filter(|(_, token)| !token.control).map(|(_, token)| token.token.content.as_str()));
        let mut tags: Vec<&str> = tags.into_iter().collect();
        tags.retain(|tag| !controls.iter().any(|control| control.contains(tag) || tag.contains(control)));
        tags.sort_unstable();
        Ok(Watch {
            controls: search(&controls, MatchKind::Standard)?,
            tags: search(&tags, MatchKind::LeftmostLongest)?,
            ends,
            firsts,
        })
    }

    /// Byte positions of the characters to replace, ascending.
    fn marks(&self, text: &str) -> Vec<usize> {
        let watched = |c: char| self.ends.contains(&c) || self.firsts.contains(&c);
        if !text.chars().any(watched) {
            return Vec::new();
        }
        let tags: Vec<Range<usize>> =
            self.tags.iter().flat_map(|tags| tags.leftmost_find_iter(text)).map(|tag| tag.start()..tag.end()).collect();
        let in_tag = |at: usize| {
            let index = tags.partition_point(|tag| tag.end <= at);
            tags.get(index).is_some_and(|tag| tag.start <= at)
        };
        let ends = text.char_indices().filter(|(at, c)| self.ends.contains(c) && !in_tag(*at)).map(|(at, _)| at);
        let mut marks: Vec<usize> = ends.collect();
        let whole = self.controls.iter().flat_map(|controls| controls.find_overlapping_iter(text));
        marks.extend(whole.map(|found| found.start()));
        marks.sort_unstable();
        marks.dedup();
        marks
    }
}

/// The stand-ins of one call.
pub struct Guard<'a> {
    watch: &'a Watch,
    /// (character, its stand-in)
    map: Vec<(char, char)>,
    /// A stand-in for nothing: marks the end of the message that is to be continued.
    pub end_mark: char,
}

impl<'a> Guard<'a> {
    /// `visit_strings` calls its argument with every string that will be seen by the template.
    pub fn new(watch: &'a Watch, visit_strings: impl FnOnce(&mut dyn FnMut(&str))) -> Fallible<Guard<'a>> {
        let mut taken: AHashSet<char> = AHashSet::new();
        visit_strings(&mut |text| taken.extend(text.chars().filter(|c| is_stand_in(*c))));
        let mut next = RandomState::new().hash_one(0u8) as u32;
        let mut tries = 0;
        let mut draw = || loop {
            tries += 1;
            if tries > STAND_INS {
                return Err(Fault::invalid("messages: the text uses up the private-use characters"));
            }
            next = next.wrapping_add(1);
            let candidate = stand_in(next);
            if taken.insert(candidate) {
                return Ok(candidate);
            }
        };
        let mut map = Vec::new();
        for c in watch.ends.iter().chain(&watch.firsts) {
            if !map.iter().any(|(known, _)| known == c) {
                map.push((*c, draw()?));
            }
        }
        let end_mark = draw()?;
        Ok(Guard { watch, map, end_mark })
    }

    pub fn protect(&self, text: &str) -> String {
        let marks = self.watch.marks(text);
        if marks.is_empty() {
            return text.to_string();
        }
        let mut out = String::with_capacity(text.len() + marks.len() * 3);
        let mut done = 0;
        for mark in marks {
            let Some(c) = text[mark..].chars().next() else { continue };
            let Some((_, replacement)) = self.map.iter().find(|(known, _)| *known == c) else { continue };
            out.push_str(&text[done..mark]);
            out.push(*replacement);
            done = mark + c.len_utf8();
        }
        out.push_str(&text[done..]);
        out
    }

    /// Turns stand-ins back; also returns the byte ranges of the characters they stood for, ascending.
    pub fn restore(&self, text: &str) -> (String, Vec<Range<usize>>) {
        let mut out = String::with_capacity(text.len());
        let mut spans: Vec<Range<usize>> = Vec::new();
        for c in text.chars() {
            if !is_stand_in(c) {
                out.push(c);
                continue;
            }
            match self.map.iter().find(|(_, replacement)| *replacement == c) {
                None => out.push(c),
                Some((original, _)) => {
                    let start = out.len();
                    out.push(*original);
                    match spans.last_mut() {
                        Some(last) if last.end == start => last.end = out.len(),
                        _ => spans.push(start..out.len()),
                    }
                }
            }
        }
        (out, spans)
    }
}
