//! Incremental detokenizer: one token in, the text that is now certain out. The state is bounded (at most three bytes of
//! an unfinished character, or one run of byte-fallback tokens), the cost per token is the length of its text, and the
//! outputs put together are what decoding all ids at once gives: batch decoding is this same machine run to its end.

use std::sync::Arc;

use crate::pieces::{Pieces, Rules};
use crate::tokenizer::Tokenizer;

/// A run of byte-fallback tokens is one unit for transformers: one wrong byte turns the whole run into U+FFFD. So a run
/// is held back until it ends, but never for longer than this many bytes (no text has such runs; a broken model may).
const MAX_BYTE_RUN: usize = 4096;

pub struct Decoding {
    skip_special: bool,
    first: bool,
    strip_left: usize,
    /// Unfinished UTF-8 (byte level) or the current run of byte tokens (byte fallback).
    pending: Vec<u8>,
    /// Characters at the end that the decoder cuts if nothing follows.
    tail: String,
}

impl Decoding {
    /// `continues`: the text goes on after other text, so the rules for the start of a text do not apply.
    pub fn new(rules: &Rules, skip_special: bool, continues: bool) -> Decoding {
        let strip_left = if continues { 0 } else { rules.strip.map_or(0, |strip| strip.start) };
        Decoding { skip_special, first: !continues, strip_left, pending: Vec::new(), tail: String::new() }
    }

    /// Appends to `out` what became certain. Ids without a token stand for nothing.
    pub fn push(&mut self, pieces: &Pieces, rules: &Rules, id: u32, out: &mut String) {
        let Some(bytes) = pieces.bytes(id) else { return };
        if self.skip_special && pieces.is_special(id) {
            return;
        }
        let start = out.len();
        if rules.join_by_space && !self.first {
            out.push(' ');
        }
        if rules.byte_level {
            self.pending.extend_from_slice(bytes);
            drain_utf8(&mut self.pending, out);
        } else if pieces.is_byte_token(id) {
            self.pending.extend_from_slice(bytes);
            if self.pending.len() >= MAX_BYTE_RUN {
                self.cut_run(out);
            }
        } else {
            self.end_run(out);
            let text = std::str::from_utf8(bytes).unwrap_or("\u{FFFD}");
            if rules.drop_in_first && self.first {
                out.push_str(pieces.first_text(id).unwrap_or(text));
            } else {
                out.push_str(text);
            }
        }
        self.first = false;
        self.strip(rules, start, out);
    }

    /// The end of the text: everything still held back comes out, unfinished characters as U+FFFD.
    pub fn finish(&mut self, rules: &Rules, out: &mut String) {
        let start = out.len();
        if rules.byte_level {
            out.push_str(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
        } else {
            self.end_run(out);
        }
        self.strip(rules, start, out);
        self.tail.clear();
    }

    fn end_run(&mut self, out: &mut String) {
        match std::str::from_utf8(&self.pending) {
            Ok(text) => out.push_str(text),
            Err(_) => out.extend(self.pending.iter().map(|_| '\u{FFFD}')),
        }
        self.pending.clear();
    }

    /// Ends an overlong run, but keeps a character that has only begun.
    fn cut_run(&mut self, out: &mut String) {
        let whole = match std::str::from_utf8(&self.pending) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => self.pending.len(),
        };
        let rest = self.pending.split_off(whole);
        self.end_run(out);
        self.pending = rest;
    }

    /// Applies the Strip step to the text that was appended behind `start`.
    fn strip(&mut self, rules: &Rules, start: usize, out: &mut String) {
        let Some(strip) = rules.strip else { return };
        while self.strip_left > 0 && out.len() > start {
            if out[start..].starts_with(strip.content) {
                out.replace_range(start..start + strip.content.len_utf8(), "");
                self.strip_left -= 1;
            } else {
                self.strip_left = 0;
            }
        }
        if strip.stop > 0 && out.len() > start {
            out.insert_str(start, &self.tail);
            let mut keep = out.len();
            for (at, c) in out[start..].char_indices().rev().take(strip.stop) {
                if c != strip.content {
                    break;
                }
                keep = start + at;
            }
            self.tail = out.split_off(keep);
        }
    }
}

/// Moves all complete characters from `pending` to `out`; invalid sequences become U+FFFD exactly as a lossy conversion
/// of the whole text would make them.
fn drain_utf8(pending: &mut Vec<u8>, out: &mut String) {
    let mut used = 0;
    while used < pending.len() {
        match std::str::from_utf8(&pending[used..]) {
            Ok(text) => {
                out.push_str(text);
                used = pending.len();
            }
            Err(error) => {
                let valid = used + error.valid_up_to();
                out.push_str(std::str::from_utf8(&pending[used..valid]).expect("just checked"));
                match error.error_len() {
                    Some(wrong) => {
                        out.push('\u{FFFD}');
                        used = valid + wrong;
                    }
                    None => {
                        used = valid;
                        break;
                    }
                }
            }
        }
    }
    pending.drain(..used);
}

/// A stream with its own share of the tokenizer, for the C boundary.
pub struct Stream {
    tokenizer: Arc<Tokenizer>,
    decoding: Decoding,
    out: String,
}

impl Stream {
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool, continues: bool) -> Stream {
        let decoding = Decoding::new(tokenizer.rules(), skip_special, continues);
        Stream { tokenizer, decoding, out: String::new() }
    }

    /// The text that became certain; valid until the next call.
    pub fn push(&mut self, id: u32) -> &str {
        self.out.clear();
        self.decoding.push(self.tokenizer.pieces(), self.tokenizer.rules(), id, &mut self.out);
        &self.out
    }

    pub fn finish(&mut self) -> &str {
        self.out.clear();
        self.decoding.finish(self.tokenizer.rules(), &mut self.out);
        &self.out
    }
}
