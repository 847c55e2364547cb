//! Unit tests over the fixtures of src/text/testdata (made, with transformers' answers, by make_fixtures.py there).

mod chat;
mod decoding;
mod encoding;
mod loading;

use crate::merge::Limits;
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use std::sync::Arc;

pub const FIXTURES: [&str; 5] = ["qwen_like", "deepseek_like", "gpt2_like", "llama_like", "unigram_like"];

pub fn testdata(name: &str) -> String {
    let path = format!("{}/../../src/text/testdata/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

pub fn load(name: &str) -> Arc<Tokenizer> {
    let tokenizer = Tokenizer::new(&testdata(&format!("{name}.json")), &testdata(&format!("{name}.config.json")));
    Arc::new(tokenizer.unwrap_or_else(|fault| panic!("{name}: {}", fault.message)))
}

pub fn golden(name: &str) -> Value {
    let all: Value = serde_json::from_str(&testdata("golden.json")).expect("golden.json");
    all[name].clone()
}

pub fn ids_of(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// xorshift64*: enough for tests, and the seed that failed is printed by them.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}
