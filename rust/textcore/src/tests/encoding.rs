use super::*;
use crate::added::UserSpans;
use crate::fault::Status;
use tokenizers::Tokenizer as Library;

#[test]
fn encodes_as_transformers_does() {
    for name in FIXTURES {
        let tokenizer = load(name);
        for case in golden(name)["encode"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("text");
            let ids = tokenizer.encode(text, case["special"] == true, &Limits::default()).expect("encodes");
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
                tokenizer.encode(&text, false, &Limits::default()).expect("encodes"),
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
            let ids = tokenizer.encode(&text, false, &Limits::default()).expect("encodes");
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
    let ids =
        tokenizer.encode("<think>a</think><|im_start|><|fim_prefix|>", false, &Limits::default()).expect("encodes");
    let think = tokenizer.encode("<think>", false, &Limits::default()).expect("encodes");
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
            let ids = tokenizer.encode_spans(&text, &user, &Limits::default()).expect("encodes");
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
            let ids = tokenizer.encode_spans(text, &user, &Limits::default()).expect("encodes");
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
        let ids = tokenizer.encode(&text, false, &Limits::default()).expect("encodes");
        assert_eq!(tokenizer.decode(&ids, false), text.replace("e\u{301}", "é"), "{unit:?}");
        assert!(start.elapsed().as_secs() < 60, "{unit:?} took {:?}", start.elapsed());
    }
}

/// Text of letters only, so that it is one word: runs of whole tokens, of one letter, and of noise.
fn random_long_word(random: &mut Random, bytes: usize) -> String {
    const PARTS: [&str; 12] = ["the", "river", "ing", "a", "b", "th", "e", "é", "ß", "水", "ſ", "zz"];
    let mut word = String::new();
    while word.len() < bytes {
        let part = PARTS[random.below(PARTS.len())];
        let repeats = if random.below(50) == 0 { random.below(300) } else { 1 };
        (0..=repeats).for_each(|_| word.push_str(part));
    }
    word
}

#[test]
fn long_words_equal_the_librarys() {
    for name in ["qwen_like", "gpt2_like"] {
        let tokenizer = load(name);
        let library: Library = testdata(&format!("{name}.json")).parse().expect("loads");
        for seed in 0..40 {
            let mut random = Random::new(seed);
            let word = random_long_word(&mut random, 4096 + seed as usize * 100);
            let expected = library.encode_fast(word.as_str(), false).expect("encodes");
            let ids = tokenizer.encode(&word, false, &Limits::default()).expect("encodes");
            assert_eq!(ids, expected.get_ids(), "{name} seed {seed}");
        }
    }
}

#[test]
fn what_cannot_fit_is_refused_before_it_is_encoded() {
    let tokenizer = load("qwen_like");
    let text = "a".repeat(30 << 20);
    let start = std::time::Instant::now();
    let limits = Limits { max_tokens: Some(4096), stop: None };
    let fault = tokenizer.encode(&text, false, &limits).expect_err("too long");
    assert_eq!(fault.status, Status::TooLong);
    assert!(fault.message.starts_with("at least "), "{}", fault.message);
    assert!(fault.message.contains("31457280 bytes"), "{}", fault.message);
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    // What may fit is encoded, also where it turns out not to.
    let longest: usize = fault.message.rsplit(' ').next().expect("a number").parse().expect("a number");
    let border = "a".repeat(4096 * longest);
    assert!(tokenizer.encode(&border, false, &limits).is_ok());
    assert!(tokenizer.encode(&format!("{border}a"), false, &limits).is_err());
}

#[test]
fn a_set_flag_stops_long_work() {
    let stop = std::sync::atomic::AtomicBool::new(false);
    for unit in ["a", "a b ", "<think>"] {
        stop.store(false, std::sync::atomic::Ordering::Relaxed);
        let text = unit.repeat((24 << 20) / unit.len());
        let limits = Limits { max_tokens: None, stop: Some(&stop) };
        let tokenizer = load("qwen_like");
        let after = std::thread::scope(|scope| {
            let work = scope.spawn(|| tokenizer.encode(&text, false, &limits).map(|ids| ids.len()));
            std::thread::sleep(std::time::Duration::from_millis(100));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            let start = std::time::Instant::now();
            let result = work.join().expect("no panic");
            assert_eq!(result.expect_err("stopped").status, Status::Stopped, "{unit:?}");
            start.elapsed()
        });
        assert!(after.as_millis() < 2000, "{unit:?}: {after:?}");
    }
}

#[test]
fn a_word_that_only_the_library_can_take_is_bounded() {
    for name in ["llama_like", "unigram_like"] {
        let fault = load(name).encode(&"a".repeat((4 << 20) + 1), false, &Limits::default()).expect_err("too long");
        assert_eq!(fault.status, Status::Invalid, "{name}");
        assert!(fault.message.contains("4194305 bytes") && fault.message.contains("4194304"), "{}", fault.message);
    }
}
