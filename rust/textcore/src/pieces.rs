//! From token ids back to bytes. At load every token is turned into the piece of text it stands for, so that decoding is
//! appending. The decoders that the model families use (byte level; SentencePiece with byte fallback; Metaspace) reduce
//! to that plus four small rules kept in `Rules`; any other decoder is refused rather than decoded approximately.

use ahash::AHashMap;
use std::sync::LazyLock;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::Decoder;

use crate::fault::{Fallible, Fault};

#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Token strings spell bytes in the byte-level alphabet; invalid UTF-8 becomes U+FFFD.
    pub byte_level: bool,
    /// Tokens `<0x00>` … `<0xFF>` are bytes; a run of them is one unit, valid or not.
    pub byte_fallback: bool,
    /// The first token of a text has a text of its own (Metaspace gives it no leading space).
    pub drop_in_first: bool,
    /// Without any decoder the library joins tokens by spaces.
    pub join_by_space: bool,
    /// Up to so many of this character are cut from the start and the end of the text.
    pub strip: Option<Strip>,
}

#[derive(Clone, Copy, Debug)]
pub struct Strip {
    pub content: char,
    pub start: usize,
    pub stop: usize,
}

/// The decoder of a tokenizer.json, checked and taken apart.
pub struct Plan {
    pub rules: Rules,
    /// Steps that rewrite one token at a time, applied at load.
    steps: Vec<DecoderWrapper>,
}

impl Plan {
    pub fn new(decoder: Option<&DecoderWrapper>) -> Fallible<Plan> {
        let mut plan = Plan { rules: Rules::default(), steps: Vec::new() };
        let mut fused = false;
        match decoder {
            None => plan.rules.join_by_space = true,
            Some(DecoderWrapper::Sequence(sequence)) => {
                for step in sequence.get_decoders() {
                    plan.add(step, &mut fused)?;
                }
            }
            Some(single) => plan.add(single, &mut fused)?,
        }
        Ok(plan)
    }

    fn add(&mut self, step: &DecoderWrapper, fused: &mut bool) -> Fallible<()> {
        let name = match step {
            DecoderWrapper::Fuse(_) => {
                *fused = true;
                return Ok(());
            }
            DecoderWrapper::Strip(strip) if *fused && self.rules.strip.is_none() => {
                self.rules.strip = Some(Strip { content: strip.content, start: strip.start, stop: strip.stop });
                return Ok(());
            }
            DecoderWrapper::ByteLevel(_) if !*fused && !self.rules.byte_fallback && !self.rules.byte_level => {
                self.rules.byte_level = true;
                return Ok(());
            }
            DecoderWrapper::ByteFallback(_) if !*fused && !self.rules.byte_level => {
                self.rules.byte_fallback = true;
                return Ok(());
            }
            DecoderWrapper::Replace(_) if !*fused && !self.rules.byte_level && !self.rules.byte_fallback => {
                self.steps.push(step.clone());
                return Ok(());
            }
            DecoderWrapper::Metaspace(metaspace)
                if !*fused && !self.rules.byte_level && !self.rules.byte_fallback && self.steps.is_empty() =>
            {
                self.steps.push(step.clone());
                if metaspace.prepend_scheme != PrependScheme::Never {
                    self.rules.drop_in_first = true;
                }
                return Ok(());
            }
            DecoderWrapper::Strip(_) => "Strip",
            DecoderWrapper::ByteLevel(_) => "ByteLevel",
            DecoderWrapper::ByteFallback(_) => "ByteFallback",
            DecoderWrapper::Replace(_) => "Replace",
            DecoderWrapper::Metaspace(_) => "Metaspace",
            DecoderWrapper::BPE(_) => "BPEDecoder",
            DecoderWrapper::WordPiece(_) => "WordPiece",
            DecoderWrapper::CTC(_) => "CTC",
            DecoderWrapper::Sequence(_) => "nested Sequence",
        };
        Err(Fault::unsupported(format!(
            "tokenizer.json: decoder step {name} at this place cannot be decoded incrementally; supported are ByteLevel, \
             Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip"
        )))
    }

    fn rewrite(&self, token: &str, first: bool) -> Fallible<String> {
        let mut text = token.to_string();
        for step in &self.steps {
            let tokens = if first { vec![text] } else { vec![String::new(), text] };
            text = step
                .decode_chain(tokens)
                .map_err(|error| Fault::bad_file(format!("tokenizer.json: decoder fails on a token: {error}")))?
                .pop()
                .unwrap_or_default();
        }
        Ok(text)
    }

    /// What the token stands for as the first of a text, if that differs.
    pub fn first_text(&self, token: &str) -> Fallible<Option<String>> {
        if !self.rules.drop_in_first {
            return Ok(None);
        }
        let first = self.rewrite(token, true)?;
        Ok(if first == self.rewrite(token, false)? { None } else { Some(first) })
    }

    /// The bytes of one token, and whether it is a byte-fallback token.
    pub fn piece(&self, token: &str) -> Fallible<(Vec<u8>, bool)> {
        let text = self.rewrite(token, false)?;
        if self.rules.byte_fallback {
            if let Some(byte) = parse_byte_token(&text) {
                return Ok((vec![byte], true));
            }
        }
        if self.rules.byte_level {
            return Ok((byte_level_bytes(&text), false));
        }
        Ok((text.into_bytes(), false))
    }
}

fn parse_byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 {
        u8::from_str_radix(hex, 16).ok()
    } else {
        None
    }
}

/// The byte-level alphabet: printable bytes stand for themselves, the other 68 are shifted to U+0100 and up.
/// Index = byte, value = its character.
pub static BYTE_CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut table = ['\0'; 256];
    let mut shifted = 0;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable {
            u32::from(byte)
        } else {
            shifted += 1;
            0xFF + shifted
        };
        table[usize::from(byte)] = char::from_u32(code).expect("below the surrogates");
    }
    table
});

/// Character code - 0 … 0x143 → byte, or -1.
static CHAR_BYTES: LazyLock<[i16; 0x144]> = LazyLock::new(|| {
    let mut table = [-1; 0x144];
    for (byte, character) in BYTE_CHARS.iter().enumerate() {
        table[*character as usize] = byte as i16;
    }
    table
});

/// A token with any character outside the alphabet (an added token such as `<｜User｜>`) stands for its own UTF-8.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(|c| CHAR_BYTES.get(c as usize).filter(|byte| **byte >= 0).map(|byte| *byte as u8))
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;
const CONTROL: u8 = 4;
const BYTE_TOKEN: u8 = 8;

/// All pieces, indexed by id; ids without a token are gaps.
pub struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<u32>,
    flags: Vec<u8>,
    first_texts: AHashMap<u32, String>,
}

pub struct Entry {
    pub bytes: Vec<u8>,
    pub first_text: Option<String>,
    pub byte_token: bool,
    pub special: bool,
    pub control: bool,
}

impl Pieces {
    pub fn new(entries: impl Iterator<Item = Option<Entry>>) -> Fallible<Pieces> {
        let mut pieces =
            Pieces { bytes: Vec::new(), ends: Vec::new(), flags: Vec::new(), first_texts: AHashMap::new() };
        for entry in entries {
            let mut flags = 0;
            if let Some(entry) = entry {
                if let Some(text) = entry.first_text {
                    pieces.first_texts.insert(pieces.flags.len() as u32, text);
                }
                pieces.bytes.extend_from_slice(&entry.bytes);
                flags = KNOWN;
                flags |= if entry.special { SPECIAL } else { 0 };
                flags |= if entry.control { CONTROL } else { 0 };
                flags |= if entry.byte_token { BYTE_TOKEN } else { 0 };
            }
            let end = u32::try_from(pieces.bytes.len())
                .map_err(|_| Fault::bad_file("tokenizer.json: the vocabulary holds more than 4 GiB of text"))?;
            pieces.ends.push(end);
            pieces.flags.push(flags);
        }
        Ok(pieces)
    }

    /// One past the highest id.
    pub fn len(&self) -> usize {
        self.flags.len()
    }

    fn flag(&self, id: u32, flag: u8) -> bool {
        self.flags.get(id as usize).is_some_and(|flags| flags & flag != 0)
    }
    pub fn is_known(&self, id: u32) -> bool {
        self.flag(id, KNOWN)
    }
    pub fn is_special(&self, id: u32) -> bool {
        self.flag(id, SPECIAL)
    }
    pub fn is_control(&self, id: u32) -> bool {
        self.flag(id, CONTROL)
    }
    pub fn is_byte_token(&self, id: u32) -> bool {
        self.flag(id, BYTE_TOKEN)
    }

    pub fn first_text(&self, id: u32) -> Option<&str> {
        self.first_texts.get(&id).map(String::as_str)
    }

    /// The bytes of a token; `None` for an id without a token.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        if !self.is_known(id) {
            return None;
        }
        let index = id as usize;
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        Some(&self.bytes[start..self.ends[index] as usize])
    }
}
