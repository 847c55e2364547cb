//! Text for Tandem: see include/textcore.h for the interface and its rules of ownership.

mod added;
mod config;
mod engine;
mod fast;
mod fault;
mod ffi;
mod guard;
mod merge;
mod meter;
mod pieces;
mod pyjson;
mod stream;
mod template;
mod tokenizer;

#[cfg(test)]
mod tests;
