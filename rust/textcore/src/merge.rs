//! Byte-pair merging of one long word, in time near linear in its bytes, and stoppable.
//!
//! The library keeps every possible merge in one heap, which costs a microsecond per byte on a word of megabytes. Here
//! the merges of one rank lie in a list of their own, in the order of their positions, and the heap holds ranks only.
//! The order of merges, and so the result, is the library's: lowest rank first, of equal ranks leftmost first.

use ahash::AHashMap;
use serde::Deserialize;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, Ordering};
use tokenizers::{ModelWrapper, Tokenizer as Library};

use crate::fault::{Fallible, Fault};
use crate::pieces::BYTE_CHARS;

/// Merges between two looks at the stop flag: some milliseconds.
const MERGES_PER_LOOK: usize = 1 << 15;
/// Takes the place of a symbol that was merged into its left neighbour, and ends the list of symbols.
const NONE: u32 = u32::MAX;

/// What a caller may bound an encoding by.
#[derive(Clone, Copy, Default)]
pub struct Limits<'a> {
    /// A text of certainly more tokens than this is refused before it is encoded.
    pub max_tokens: Option<usize>,
    /// Set by another thread to end the encoding.
    pub stop: Option<&'a AtomicBool>,
}

impl Limits<'_> {
    pub fn check_stop(&self) -> Fallible<()> {
        match self.stop {
            Some(stop) if stop.load(Ordering::Relaxed) => Err(Fault::stopped()),
            _ => Ok(()),
        }
    }
}

/// The model's part of tokenizer.json, as the library writes it.
#[derive(Deserialize)]
struct Model {
    vocab: AHashMap<String, u32>,
    /// In the order of their ranks.
    merges: Vec<(String, String)>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    ignore_merges: bool,
}

pub struct Merger {
    byte_ids: [u32; 256],
    /// (left id << 32 | right id) → (rank, id of both together)
    merges: AHashMap<u64, (u32, u32)>,
    /// Id that a merge of this rank makes.
    made: Vec<u32>,
    pub longest_token_bytes: usize,
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// The symbols of a word as a linked list in arrays; a symbol keeps the index of its first byte.
struct Symbols {
    ids: Vec<u32>,
    next: Vec<u32>,
    prev: Vec<u32>,
}

/// Positions that may be merged, by rank.
#[derive(Default)]
struct Waiting {
    positions: AHashMap<u32, Vec<u32>>,
    ranks: BinaryHeap<Reverse<u32>>,
}

impl Waiting {
    fn push(&mut self, rank: u32, position: u32) {
        let list = self.positions.entry(rank).or_default();
        if list.is_empty() {
            self.ranks.push(Reverse(rank));
        }
        list.push(position);
    }

    /// The lowest rank and its positions, the leftmost last.
    fn pop(&mut self) -> Option<(u32, Vec<u32>)> {
        let Reverse(rank) = self.ranks.pop()?;
        let mut list = self.positions.remove(&rank).unwrap_or_default();
        list.sort_unstable_by(|a, b| b.cmp(a));
        Some((rank, list))
    }

    fn put_back(&mut self, rank: u32, rest: Vec<u32>) {
        for position in rest {
            self.push(rank, position);
        }
    }

    fn lowest_rank(&self) -> u32 {
        self.ranks.peek().map_or(NONE, |Reverse(rank)| *rank)
    }
}

impl Merger {
    /// `None` if words of this model are more than bytes that are merged; `is_control` says which tokens may not come
    /// out of a text.
    pub fn detect(library: &Library, is_control: impl Fn(u32) -> bool) -> Fallible<Option<Merger>> {
        let ModelWrapper::BPE(bpe) = library.get_model() else { return Ok(None) };
        let failed = |error: serde_json::Error| Fault::bad_file(format!("tokenizer.json: model: {error}"));
        let json = serde_json::to_string(bpe).map_err(failed)?;
        let model: Model = serde_json::from_str(&json).map_err(failed)?;
        let is_set = |affix: &Option<String>| affix.as_ref().is_some_and(|affix| !affix.is_empty());
        if is_set(&model.continuing_subword_prefix) || is_set(&model.end_of_word_suffix) {
            return Ok(None);
        }
        let mut byte_ids = [0; 256];
        for (id, spelled) in byte_ids.iter_mut().zip(BYTE_CHARS.iter()) {
            let Some(known) = model.vocab.get(spelled.encode_utf8(&mut [0; 4]) as &str) else { return Ok(None) };
            *id = *known;
        }
        let mut merges = AHashMap::with_capacity(model.merges.len());
        let mut made = Vec::with_capacity(model.merges.len());
        for (rank, (left, right)) in model.merges.iter().enumerate() {
            let id_of = |token: &str| model.vocab.get(token).copied();
            let (Some(a), Some(b), Some(both)) = (id_of(left), id_of(right), id_of(&format!("{left}{right}"))) else {
                return Ok(None);
            };
            merges.insert(pair(a, b), (rank as u32, both));
            made.push(both);
        }
        // Such a token would have to be cut again, which only the caller's way through the library does.
        if byte_ids.iter().chain(&made).any(|id| is_control(*id)) {
            return Ok(None);
        }
        let reachable = byte_ids.iter().chain(&made).copied().collect::<ahash::AHashSet<u32>>();
        let counts = |id: u32| model.ignore_merges || reachable.contains(&id);
        let lengths = model.vocab.iter().filter(|(_, id)| counts(**id)).map(|(token, _)| token.chars().count());
        let longest_token_bytes = lengths.max().unwrap_or(1).max(1);
        Ok(Some(Merger { byte_ids, merges, made, longest_token_bytes }))
    }

    /// Appends the ids of `word`, which must not be a token of its own.
    pub fn encode(&self, word: &[u8], limits: &Limits, ids: &mut Vec<u32>) -> Fallible<()> {
        if word.len() >= NONE as usize {
            return Err(Fault::invalid(format!("a word has {} bytes, the limit is {}", word.len(), NONE - 1)));
        }
        let end = word.len() as u32;
        let mut symbols = Symbols {
            ids: word.iter().map(|byte| self.byte_ids[usize::from(*byte)]).collect(),
            next: (1..=end).map(|next| if next == end { NONE } else { next }).collect(),
            prev: (0..end).map(|at| at.wrapping_sub(1)).collect(),
        };
        let mut waiting = Waiting::default();
        for at in 0..end.saturating_sub(1) {
            if at as usize % MERGES_PER_LOOK == 0 {
                limits.check_stop()?;
            }
            if let Some((rank, _)) = self.find(&symbols, at) {
                waiting.push(rank, at);
            }
        }
        let mut looks = 0;
        while let Some((rank, mut list)) = waiting.pop() {
            while let Some(at) = list.pop() {
                looks += 1;
                if looks % MERGES_PER_LOOK == 0 {
                    limits.check_stop()?;
                }
                // What waited may have been merged with another neighbour meanwhile.
                let made = self.made[rank as usize];
                if self.find(&symbols, at).is_some_and(|(_, id)| id == made) {
                    self.merge(&mut symbols, at, made, &mut waiting);
                }
                if waiting.lowest_rank() <= rank {
                    waiting.put_back(rank, std::mem::take(&mut list));
                }
            }
        }
        ids.extend(symbols.ids.iter().filter(|id| **id != NONE));
        Ok(())
    }

    /// The merge of the symbol at `at` with the next one, if both are there and it is one.
    fn find(&self, symbols: &Symbols, at: u32) -> Option<(u32, u32)> {
        let (left, next) = (symbols.ids[at as usize], symbols.next[at as usize]);
        if left == NONE || next == NONE {
            return None;
        }
        self.merges.get(&pair(left, symbols.ids[next as usize])).copied()
    }

    fn merge(&self, symbols: &mut Symbols, at: u32, made: u32, waiting: &mut Waiting) {
        let right = symbols.next[at as usize];
        let beyond = symbols.next[right as usize];
        symbols.ids[at as usize] = made;
        symbols.ids[right as usize] = NONE;
        symbols.next[at as usize] = beyond;
        if beyond != NONE {
            symbols.prev[beyond as usize] = at;
        }
        let before = symbols.prev[at as usize];
        for position in [before, at] {
            if position == NONE {
                continue;
            }
            if let Some((rank, _)) = self.find(symbols, position) {
                waiting.push(rank, position);
            }
        }
    }
}
