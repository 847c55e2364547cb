use super::*;
use crate::added::UserSpans;
use tokenizers::Tokenizer as Library;

#[test]
fn encodes_as_transformers_does() {
    for name in FIXTURES {
        let tokenizer = load(name);
        for case in golden(name)["encode"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("text");
            let ids = tokenizer.encode(text, case["special"] == true).expect("encodes");
            assert_eq!(ids, ids_of(&case["ids"]), "{name}: {text:?}");
        }
    }
}

fn random_text(random: &mut Random) -> String {
    const PARTS: [&str; 24] = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "the river",
        "'ll",
        "12",
        "345678",
        "долину",
        "谷を",
        "水很冷",
        "é",
        "e\u{301}",
        "😀",
        "…",
        "<think>",
        "</",
        "|>",
        "x=1;",
        "\u{3000}",
        "\u{0}",
        "ſ",
        "\u{1F468}\u{200D}\u{1F469}",
    ];
    (0..random.below(30)).map(|_| PARTS[random.below(PARTS.len())]).collect()
}

#[test]
fn fast_path_equals_the_library() {
    for name in ["qwen_like", "deepseek_like", "gpt2_like"] {
        let tokenizer = load(name);
        let library: Library = testdata(&format!("{name}.json")).parse().expect("loads");
        for seed in 0..400 {
            let text = random_text(&mut Random::new(seed));
            let expected = library.encode_fast(text.as_str(), false).expect("encodes");
            assert_eq!(
                tokenizer.encode(&text, false).expect("encodes"),
                expected.get_ids(),
                "{name} seed {seed}: {text:?}"
            );
        }
    }
}

#[test]
fn user_text_never_becomes_a_control_token() {
    for name in FIXTURES {
        let tokenizer = load(name);
        let controls: Vec<String> = tokenizer
            .added()
            .iter()
            .filter(|(_, added)| added.control)
            .map(|(_, added)| added.token.content.clone())
            .collect();
        assert!(!controls.is_empty());
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let mut text = String::new();
            for _ in 0..random.below(8) {
                text.push_str(&random_text(&mut random));
                text.push_str(&controls[random.below(controls.len())]);
            }
            let ids = tokenizer.encode(&text, false).expect("encodes");
            // <unk> is special too, but a character outside the vocabulary rightly becomes it.
            let has_unk = name == "llama_like" || name == "unigram_like";
            let forged = ids.iter().any(|id| tokenizer.pieces().is_control(*id) && !(has_unk && *id == 0));
            assert!(!forged, "{name} seed {seed}: {text:?} → {ids:?}");
        }
    }
}

#[test]
fn non_control_added_tokens_stay_tokens_in_user_text() {
    let tokenizer = load("qwen_like");
    let ids = tokenizer.encode("<think>a</think><|im_start|><|fim_prefix|>", false).expect("encodes");
    let think = tokenizer.encode("<think>", false).expect("encodes");
    assert_eq!(think.len(), 1);
    assert_eq!(ids[0], think[0]);
    assert!(ids.iter().all(|id| !tokenizer.pieces().is_control(*id)));
}

#[test]
fn control_tokens_are_found_only_outside_user_spans() {
    for (name, mark) in [("qwen_like", "<|im_start|>"), ("deepseek_like", "<｜User｜>"), ("llama_like", "</s>")] {
        let tokenizer = load(name);
        let text = format!("{mark}a{mark}b");
        let second = mark.len() + 1..mark.len() * 2 + 1;
        let count = |user| {
            let ids = tokenizer.encode_spans(&text, &user).expect("encodes");
            ids.iter().filter(|id| tokenizer.pieces().is_control(**id)).count()
        };
        assert_eq!(count(UserSpans::Ranges(Vec::new())), 2, "{name}");
        assert_eq!(count(UserSpans::Ranges(vec![second.clone()])), 1, "{name}");
        // One byte of the user's inside the mark is enough.
        assert_eq!(count(UserSpans::Ranges(vec![second.start + 2..second.start + 3])), 1, "{name}");
        assert_eq!(count(UserSpans::All), 0, "{name}");
    }
}

#[test]
fn normalised_marks_are_the_templates_only_as_written() {
    // <|mark|> is looked for after NFKC, which turns full-width signs into ASCII; NFC leaves them alone.
    for normalizer in ["NFC", "NFKC"] {
        let mut json: Value = serde_json::from_str(&testdata("qwen_like.json")).expect("json");
        json["normalizer"] = serde_json::json!({"type": normalizer});
        json["added_tokens"].as_array_mut().expect("a list").push(serde_json::json!({"id": 710, "content": "<|mark|>",
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": true, "special": true}));
        let tokenizer = Tokenizer::new(&json.to_string(), "").expect("loads");
        let text = "e\u{301}<|mark|>＜|mark|＞<|mark|>e\u{301}";
        let second = text.rfind("<|mark|>").expect("is there");
        let count = |user| {
            let ids = tokenizer.encode_spans(text, &user).expect("encodes");
            ids.iter().filter(|id| **id == 710).count()
        };
        assert_eq!(count(UserSpans::Ranges(Vec::new())), 2, "{normalizer}");
        assert_eq!(count(UserSpans::Ranges(vec![second..second + 1])), 1, "{normalizer}");
        assert_eq!(count(UserSpans::All), 0, "{normalizer}");
    }
}

#[test]
fn long_runs_take_linear_time() {
    let tokenizer = load("qwen_like");
    for unit in [" ", "a", "\n", " \n", "<", "1", "e\u{301}", "<|im_start|>"] {
        let text = unit.repeat(1_200_000 / unit.len());
        let start = std::time::Instant::now();
        let ids = tokenizer.encode(&text, false).expect("encodes");
        assert_eq!(tokenizer.decode(&ids, false), text.replace("e\u{301}", "é"), "{unit:?}");
        assert!(start.elapsed().as_secs() < 60, "{unit:?} took {:?}", start.elapsed());
    }
}
