use super::*;
use crate::stream::Stream;
use tokenizers::Tokenizer as Library;

#[test]
fn decodes_as_transformers_does() {
    for name in FIXTURES {
        let tokenizer = load(name);
        for case in golden(name)["decode"].as_array().expect("cases") {
            let ids = ids_of(&case["ids"]);
            assert_eq!(tokenizer.decode(&ids, case["skip"] == true), case["text"], "{name}: {ids:?}");
        }
    }
}

fn random_ids(random: &mut Random, size: usize) -> Vec<u32> {
    // Low ids are single bytes in most fixtures, so half of the draws come from there.
    (0..random.below(60))
        .map(|_| if random.below(2) == 0 { random.below(300) } else { random.below(size + 2) } as u32)
        .collect()
}

#[test]
fn streaming_equals_batch_and_the_library() {
    for name in FIXTURES {
        let tokenizer = load(name);
        let library: Library = testdata(&format!("{name}.json")).parse().expect("loads");
        for seed in 0..600 {
            let mut random = Random::new(seed);
            let ids = random_ids(&mut random, tokenizer.pieces().len());
            let skip = random.below(2) == 0;
            let batch = tokenizer.decode(&ids, skip);
            assert_eq!(batch, library.decode(&ids, skip).expect("decodes"), "{name} seed {seed}: {ids:?}");
            let mut stream = Stream::new(tokenizer.clone(), skip, false);
            let mut text = String::new();
            for id in &ids {
                let piece = stream.push(*id);
                text.push_str(piece);
                assert!(batch.starts_with(&text), "{name} seed {seed}: took back text at {id} of {ids:?}");
            }
            text.push_str(stream.finish());
            assert_eq!(text, batch, "{name} seed {seed}: {ids:?}");
        }
    }
}

#[test]
fn half_a_character_is_held_back() {
    let tokenizer = load("qwen_like");
    let ids = tokenizer.encode("𝄞", false, &Limits::default()).expect("encodes");
    assert!(ids.len() > 1);
    let mut stream = Stream::new(tokenizer.clone(), true, false);
    let (last, head) = ids.split_last().expect("ids");
    for id in head {
        assert_eq!(stream.push(*id), "");
    }
    assert_eq!(stream.push(*last), "𝄞");
    assert_eq!(stream.push(head[0]), "");
    assert_eq!(stream.finish(), "\u{FFFD}");
}

#[test]
fn replacement_characters_of_the_model_itself_do_not_stall() {
    let tokenizer = load("qwen_like");
    let ids = tokenizer.encode("\u{FFFD}", false, &Limits::default()).expect("encodes");
    let mut stream = Stream::new(tokenizer.clone(), true, false);
    let text: String = ids.iter().map(|id| stream.push(*id).to_string()).collect();
    assert_eq!(text, "\u{FFFD}");
}

#[test]
fn byte_run_is_bounded() {
    let tokenizer = load("llama_like");
    let byte = |value: u8| 3 + u32::from(value);
    let mut stream = Stream::new(tokenizer.clone(), false, false);
    let mut text = String::new();
    for _ in 0..5000 {
        for value in "é".bytes() {
            text.push_str(stream.push(byte(value)));
        }
    }
    assert!(!text.is_empty() && text.len() < 10_000);
    text.push_str(stream.finish());
    assert_eq!(text, "é".repeat(5000));
}

#[test]
fn text_after_a_prompt_keeps_its_leading_space() {
    let tokenizer = load("llama_like");
    let ids = tokenizer.encode("river", false, &Limits::default()).expect("encodes");
    let run = |continues| {
        let mut stream = Stream::new(tokenizer.clone(), false, continues);
        let mut text: String = ids.iter().map(|id| stream.push(*id).to_string()).collect();
        text.push_str(stream.finish());
        text
    };
    assert_eq!(run(false), "river");
    assert_eq!(run(true), " river");
}
