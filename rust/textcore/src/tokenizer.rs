//! Loading a tokenizer.json as transformers would, encoding with the rule that user text never becomes a control token,
//! and decoding.

use ahash::AHashSet;
use serde::Deserialize;
use std::borrow::Cow;
use std::ops::Range;
use tokenizers::{
    AddedToken, Encoding, Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetType,
    PostProcessor, PreTokenizedString, PreTokenizer, Token, Tokenizer as Library,
};

use crate::added::{AddedTokens, Piece, UserSpans};
use crate::config::TokenizerConfig;
use crate::fast::{check_library_bytes, FastPath};
use crate::fault::{excerpt, Fallible, Fault};
use crate::merge::Limits;
use crate::pieces::{Entry, Pieces, Plan, Rules};
use crate::stream::Decoding;

/// Ids are table indexes; the largest vocabularies have 262,144 entries.
pub const MAX_VOCAB: usize = 1 << 22;

pub struct Tokenizer {
    library: Library,
    added: AddedTokens,
    fast: Option<FastPath>,
    pieces: Pieces,
    rules: Rules,
    /// Ids that encoding with special tokens puts around the text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Stands for characters outside the vocabulary, so it may come out of user text although it is special.
    unk: Option<u32>,
}

/// The part of tokenizer.json that is checked here, because the library repairs or ignores what is wrong in it.
#[derive(Deserialize)]
struct Declared {
    #[serde(default)]
    added_tokens: Vec<DeclaredToken>,
}

#[derive(Deserialize)]
struct DeclaredToken {
    id: u32,
    content: String,
}

fn check_declared(json: &str) -> Fallible<Vec<DeclaredToken>> {
    let declared: Declared =
        serde_json::from_str(json).map_err(|error| Fault::bad_file(format!("tokenizer.json: {error}")))?;
    let mut ids = AHashSet::new();
    let mut contents = AHashSet::new();
    for token in &declared.added_tokens {
        if token.content.is_empty() {
            return Err(Fault::bad_file(format!("tokenizer.json: added token {} has no content", token.id)));
        }
        let repeated = !ids.insert(token.id) || !contents.insert(token.content.as_str());
        if repeated {
            let content = excerpt(&token.content, 40);
            return Err(Fault::bad_file(format!(
                "tokenizer.json: added token {} (\"{content}\") repeats an id or a content",
                token.id
            )));
        }
    }
    Ok(declared.added_tokens)
}

/// id → token string, for every id of the vocabulary.
fn tokens_by_id(library: &Library) -> Fallible<Vec<Option<String>>> {
    let model_vocab = library.get_model().get_vocab();
    let added = library.get_added_tokens_decoder();
    let highest = model_vocab.values().chain(added.keys()).max();
    let size = highest.map_or(0, |id| *id as usize + 1);
    if size == 0 {
        return Err(Fault::bad_file("tokenizer.json: the vocabulary is empty"));
    }
    if size > MAX_VOCAB {
        return Err(Fault::bad_file(format!("tokenizer.json: the highest id {} is over {}", size - 1, MAX_VOCAB - 1)));
    }
    let mut tokens: Vec<Option<String>> = vec![None; size];
    for (token, id) in model_vocab {
        if let Some(other) = &tokens[id as usize] {
            let (a, b) = (excerpt(other.min(&token), 40), excerpt(other.max(&token), 40));
            return Err(Fault::bad_file(format!("tokenizer.json: \"{a}\" and \"{b}\" have the same id {id}")));
        }
        tokens[id as usize] = Some(token);
    }
    for id in added.keys() {
        // The library's form for decoding: normalised where the token is matched in normalised text.
        tokens[*id as usize] = library.id_to_token(*id);
    }
    Ok(tokens)
}

/// Adds what tokenizer_config.json says about special tokens. transformers does the same after it loaded tokenizer.json.
fn apply_config(library: &mut Library, config: &TokenizerConfig) -> Fallible<()> {
    let failed = |error: tokenizers::Error| Fault::bad_file(format!("tokenizer_config.json: {error}"));
    // Tokens already there only change their flags; new ones get the next ids.
    library.add_tokens(config.added_tokens.iter().map(|(_, token)| token.clone())).map_err(failed)?;
    for (id, token) in &config.added_tokens {
        let loaded = library.token_to_id(&token.content);
        if loaded != Some(*id) {
            return Err(Fault::bad_file(format!(
                "tokenizer_config.json: added_tokens_decoder gives \"{}\" the id {id}, but tokenizer.json gives it {}",
                excerpt(&token.content, 40),
                loaded.map_or("none".to_string(), |id| id.to_string())
            )));
        }
    }
    for content in config.special_contents() {
        let Some(id) = library.token_to_id(content) else { continue };
        let known = library.get_added_vocabulary().get_added_tokens_decoder().get(&id).cloned();
        if known.as_ref().is_some_and(|token| token.special) {
            continue;
        }
        let token = match known {
            Some(token) => token.special(true),
            None => AddedToken::from(content, true),
        };
        library.add_special_tokens([token]).map_err(failed)?;
    }
    Ok(())
}

/// What the post-processor of tokenizer.json puts before and after a text.
fn probe_post_processor(library: &Library) -> Fallible<(Vec<u32>, Vec<u32>)> {
    let Some(processor) = library.get_post_processor() else { return Ok((Vec::new(), Vec::new())) };
    const PROBE: u32 = u32::MAX;
    let token = Token::new(PROBE, "probe".to_string(), (0, 5));
    let around = processor
        .process(Encoding::from_tokens(vec![token], 0), None, true)
        .map_err(|error| Fault::bad_file(format!("tokenizer.json: post_processor: {error}")))?;
    let ids = around.get_ids();
    match ids.iter().position(|id| *id == PROBE) {
        Some(at) => Ok((ids[..at].to_vec(), ids[at + 1..].to_vec())),
        None => Err(Fault::unsupported("tokenizer.json: the post_processor drops the text it is given")),
    }
}

impl Tokenizer {
    /// `config_json` is tokenizer_config.json and may be empty.
    pub fn new(tokenizer_json: &str, config_json: &str) -> Fallible<Tokenizer> {
        let config = TokenizerConfig::parse(config_json)?;
        let declared = check_declared(tokenizer_json)?;
        let mut library: Library =
            tokenizer_json.parse().map_err(|error| Fault::bad_file(format!("tokenizer.json: {error}")))?;
        for token in &declared {
            let loaded = library.token_to_id(&token.content);
            if loaded != Some(token.id) {
                return Err(Fault::bad_file(format!(
                    "tokenizer.json: added token \"{}\" declares id {}, but the vocabulary leads to {}",
                    excerpt(&token.content, 40),
                    token.id,
                    loaded.map_or("none".to_string(), |id| id.to_string())
                )));
            }
        }
        if let ModelWrapper::BPE(bpe) = library.get_model() {
            if bpe.dropout.is_some_and(|dropout| dropout > 0.0) {
                return Err(Fault::unsupported("tokenizer.json: BPE dropout makes encoding random; set it to null"));
            }
        }
        // Requests carry their own limits; a truncation or padding left over from training must not touch them.
        library.with_truncation(None).map_err(|error| Fault::internal(error.to_string()))?;
        library.with_padding(None);
        apply_config(&mut library, &config)?;
        // The library must find added tokens nowhere by itself; this module does, knowing who wrote the text.
        let added = AddedTokens::new(library.get_added_tokens_decoder(), library.get_normalizer())?;
        let id_of = |content: &Option<String>| content.as_ref().and_then(|content| library.token_to_id(content));
        let (bos, eos, unk) = (id_of(&config.bos), id_of(&config.eos), id_of(&config.unk));
        let (prefix, suffix) = match config.explicit_bos_eos() {
            Some((add_bos, add_eos)) => {
                let some_if = |add: bool, id: Option<u32>| if add { id.into_iter().collect() } else { Vec::new() };
                (some_if(add_bos, bos), some_if(add_eos, eos))
            }
            None => probe_post_processor(&library)?,
        };
        let plan = Plan::new(library.get_decoder())?;
        let pieces = build_pieces(&library, &added, &plan)?;
        if let Some(stranger) = prefix.iter().chain(&suffix).find(|id| !pieces.is_known(**id)) {
            return Err(Fault::bad_file(format!("tokenizer.json: the post_processor adds the unknown id {stranger}")));
        }
        let fast = FastPath::detect(&library, |id| pieces.is_control(id) && Some(id) != unk)?;
        Ok(Tokenizer { library, added, fast, pieces, rules: plan.rules, prefix, suffix, bos, eos, unk })
    }

    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }
    pub fn rules(&self) -> &Rules {
        &self.rules
    }
    pub fn added(&self) -> &AddedTokens {
        &self.added
    }

    /// Encodes text that a user wrote.
    pub fn encode(&self, text: &str, add_special_tokens: bool, limits: &Limits) -> Fallible<Vec<u32>> {
        let ids = self.encode_spans(text, &UserSpans::All, limits)?;
        if !add_special_tokens || (self.prefix.is_empty() && self.suffix.is_empty()) {
            return Ok(ids);
        }
        Ok([self.prefix.as_slice(), &ids, &self.suffix].concat())
    }

    /// Encodes text of which only `user` was written by a user; adds nothing around it.
    pub fn encode_spans(&self, text: &str, user: &UserSpans, limits: &Limits) -> Fallible<Vec<u32>> {
        let mut ids = Vec::new();
        let Some(fast) = &self.fast else {
            check_library_bytes(text.len())?;
            self.encode_by_library(text, user, &mut ids)?;
            return Ok(ids);
        };
        for (id, span) in self.added.split_raw(text, |start, end, _| !user.touches(start, end)) {
            limits.check_stop()?;
            match id {
                Some(id) => ids.push(id),
                None => self.encode_fast(fast, text, span, user, limits, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Refuses text that has too many tokens however it is cut: a token stands for a bounded number of bytes.
    fn check_fits(&self, fast: &FastPath, text: &str, pieces: &[Piece], known: usize, limits: &Limits) -> Fallible<()> {
        let (Some(longest), Some(most)) = (fast.longest_token_bytes(), limits.max_tokens) else { return Ok(()) };
        let tokens_of = |piece: &Piece| if piece.0.is_some() { 1 } else { piece.1.len().div_ceil(longest) };
        let least = known + pieces.iter().map(tokens_of).sum::<usize>();
        if least <= most {
            return Ok(());
        }
        Err(Fault::too_long(format!(
            "at least {least}: it has {} bytes, and no token stands for more than {longest}",
            text.len()
        )))
    }

    fn encode_fast(
        &self,
        fast: &FastPath,
        text: &str,
        span: Range<usize>,
        user: &UserSpans,
        limits: &Limits,
        ids: &mut Vec<u32>,
    ) -> Fallible<()> {
        let base = span.start;
        let written = &text[span];
        let normalized = fast.normalize(written);
        let unchanged = matches!(normalized, Cow::Borrowed(_));
        if !unchanged && self.added.has_normalized_control() && !matches!(user, UserSpans::All) {
            // Whose text a control token is in can only be told by the library's map between the two texts.
            check_library_bytes(written.len())?;
            return self.encode_by_library(written, &user.within(base..base + written.len()), ids);
        }
        let allow = |start: usize, end: usize, content: &str| {
            unchanged && !user.touches(base + start, base + end) && &written[start..end] == content
        };
        let pieces = self.added.split_normalized(&normalized, allow);
        self.check_fits(fast, &normalized, &pieces, ids.len(), limits)?;
        for (id, inner) in pieces {
            match id {
                Some(id) => ids.push(id),
                None => fast.encode(&normalized[inner], &|word, out| self.encode_word(word, out), limits, ids)?,
            }
        }
        Ok(())
    }

    /// The library's own pipeline, for tokenizers of any make: added tokens, normaliser, pre-tokenizer, model.
    fn encode_by_library(&self, text: &str, user: &UserSpans, ids: &mut Vec<u32>) -> Fallible<()> {
        let failed = |error: tokenizers::Error| Fault::invalid(format!("the text cannot be tokenized: {error}"));
        let mut split: PreTokenizedString = text.into();
        let raw_allow = |start: usize, end: usize, _: &str| !user.touches(start, end);
        split
            .split(|_, whole| {
                let pieces = self.added.split_raw(whole.get(), raw_allow);
                Ok(slices(&whole, pieces))
            })
            .map_err(failed)?;
        let normalizer = self.library.get_normalizer();
        split
            .split(|_, mut piece| {
                normalize(normalizer, &mut piece)?;
                let allow = |start: usize, end: usize, content: &str| {
                    // A control token counts only as it is written: other text may be normalised into its spelling.
                    let range = tokenizers::tokenizer::normalizer::Range::Normalized(start..end);
                    let shift = piece.offsets_original().0;
                    piece.convert_offsets(range).is_some_and(|original| {
                        let (start, end) = (shift + original.start, shift + original.end);
                        !user.touches(start, end) && text.get(start..end).is_some_and(|t| t.trim() == content.trim())
                    })
                };
                let pieces = self.added.split_normalized(piece.get(), allow);
                Ok(slices(&piece, pieces))
            })
            .map_err(failed)?;
        if let Some(pre_tokenizer) = self.library.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut split).map_err(failed)?;
        }
        split.tokenize(|word| self.tokenize_word(word.get())).map_err(failed)?;
        let encoding = split.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    fn encode_word(&self, word: &str, ids: &mut Vec<u32>) -> Fallible<()> {
        let tokens = self
            .tokenize_word(word)
            .map_err(|error| Fault::invalid(format!("the text cannot be tokenized: {error}")))?;
        ids.extend(tokens.iter().map(|token| token.id));
        Ok(())
    }

    /// Runs the model on one word. A model may hold control tokens in its own vocabulary and find them in plain text
    /// (`</s>` in a word-level or unigram vocabulary); such a token is cut after its first character and done again.
    fn tokenize_word(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        let tokens = self.library.get_model().tokenize(word)?;
        let forged = tokens.iter().find(|token| {
            self.pieces.is_control(token.id) && Some(token.id) != self.unk && token.offsets.1 > token.offsets.0
        });
        let Some(forged) = forged else { return Ok(tokens) };
        let (start, end) = forged.offsets;
        let first_len = word.get(start..end).and_then(|text| text.chars().next()).map_or(0, char::len_utf8);
        let cut = start + first_len;
        if first_len == 0 || cut >= word.len() || !word.is_char_boundary(cut) {
            return Err(format!("token {} stands for a single character and for a control token", forged.id).into());
        }
        let mut left = self.tokenize_word(&word[..cut])?;
        left.extend(self.tokenize_word(&word[cut..])?);
        Ok(left)
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut decoding = Decoding::new(&self.rules, skip_special, false);
        let mut out = String::new();
        for id in ids {
            decoding.push(&self.pieces, &self.rules, *id, &mut out);
        }
        decoding.finish(&self.rules, &mut out);
        out
    }
}

fn normalize(normalizer: Option<&NormalizerWrapper>, text: &mut NormalizedString) -> tokenizers::Result<()> {
    normalizer.map_or(Ok(()), |normalizer| normalizer.normalize(text))
}

fn slices(whole: &NormalizedString, pieces: Vec<Piece>) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    pieces
        .into_iter()
        .filter_map(|(id, span)| {
            let slice = whole.slice(tokenizers::tokenizer::normalizer::Range::Normalized(span.clone()))?;
            let tokens = id.map(|id| vec![Token::new(id, String::new(), (0, span.len()))]);
            Some((slice, tokens))
        })
        .collect()
}

fn build_pieces(library: &Library, added: &AddedTokens, plan: &Plan) -> Fallible<Pieces> {
    let tokens = tokens_by_id(library)?;
    let mut entries = Vec::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        let Some(token) = token else {
            entries.push(None);
            continue;
        };
        let (bytes, byte_token) = plan.piece(token)?;
        let known = added.get(id as u32);
        entries.push(Some(Entry {
            bytes,
            first_text: plan.first_text(token)?,
            byte_token,
            special: known.is_some_and(|known| known.token.special),
            control: known.is_some_and(|known| known.control),
        }));
    }
    Pieces::new(entries.into_iter())
}
