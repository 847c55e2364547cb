use super::*;
use crate::fault::Status;

fn edited(name: &str, edit: impl FnOnce(&mut Value)) -> String {
    let mut json: Value = serde_json::from_str(&testdata(&format!("{name}.json"))).expect("json");
    edit(&mut json);
    json.to_string()
}

fn refusal(tokenizer: &str, config: &str) -> (Status, String) {
    match Tokenizer::new(tokenizer, config) {
        Ok(_) => panic!("was accepted"),
        Err(fault) => (fault.status, fault.message),
    }
}

#[test]
fn damaged_files_are_refused_with_a_reason() {
    let whole = testdata("qwen_like.json");
    for cut in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        let text = &whole[..(cut..).find(|at| whole.is_char_boundary(*at)).expect("a boundary")];
        assert_eq!(refusal(text, "").0, Status::BadFile);
    }
    assert_eq!(refusal("[]", "").0, Status::BadFile);
    assert_eq!(refusal("{}", "").0, Status::BadFile);
    let deep = "[".repeat(100_000);
    assert_eq!(refusal(&deep, "").0, Status::BadFile);
    assert_eq!(refusal(&whole, "[1]").0, Status::BadFile);
    assert_eq!(refusal(&whole, "{\"add_bos_token\": 3}").0, Status::BadFile);
}

#[test]
fn contradictions_are_refused_and_named() {
    let empty = edited("qwen_like", |json| json["added_tokens"][0]["content"] = "".into());
    assert!(refusal(&empty, "").1.contains("no content"));
    let twice = edited("qwen_like", |json| json["added_tokens"][1]["id"] = json["added_tokens"][0]["id"].clone());
    assert!(refusal(&twice, "").1.contains("repeats"));
    let gap = edited("qwen_like", |json| json["added_tokens"][0]["id"] = 5000.into());
    assert!(refusal(&gap, "").1.contains("declares id 5000"));
    let same_id = edited("qwen_like", |json| {
        json["added_tokens"] = serde_json::json!([]);
        json["model"]["vocab"]["zzz"] = 7.into();
    });
    assert!(refusal(&same_id, "").1.contains("same id 7"));
    let huge = edited("qwen_like", |json| {
        json["added_tokens"] = serde_json::json!([]);
        json["model"]["vocab"]["zzz"] = 4_000_000_000u32.into();
    });
    assert!(refusal(&huge, "").1.contains("highest id"));
    let model = edited("qwen_like", |json| json["model"]["type"] = "Oracle".into());
    assert_eq!(refusal(&model, "").0, Status::BadFile);
    let merges = edited("qwen_like", |json| json["model"]["merges"][0] = "nowhere tofind".into());
    assert_eq!(refusal(&merges, "").0, Status::BadFile);
    let pattern = edited("qwen_like", |json| {
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(unclosed".into();
    });
    assert_eq!(refusal(&pattern, "").0, Status::BadFile);
}

#[test]
fn what_cannot_be_exact_is_unsupported() {
    let decoder = edited("qwen_like", |json| {
        json["decoder"] =
            serde_json::json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true})
    });
    assert_eq!(refusal(&decoder, "").0, Status::Unsupported);
    let dropout = edited("qwen_like", |json| json["model"]["dropout"] = 0.1.into());
    assert_eq!(refusal(&dropout, "").0, Status::Unsupported);
}

#[test]
fn config_decides_special_tokens_and_bos() {
    let tokenizer = testdata("gpt2_like.json");
    let plain = Tokenizer::new(&tokenizer, "").expect("loads");
    assert_eq!((plain.bos, plain.eos), (None, None));
    let config = r#"{"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>", "add_bos_token": true,
        "add_eos_token": true, "added_tokens_decoder": {"601": {"content": "<new>", "special": true}}}"#;
    let both = Tokenizer::new(&tokenizer, config).expect("loads");
    assert_eq!((both.bos, both.eos), (Some(600), Some(600)));
    let ids = both.encode("a<new>", true, &Limits::default()).expect("encodes");
    assert_eq!((ids[0], *ids.last().expect("eos")), (600, 600));
    assert!(!ids.contains(&601) && both.pieces().is_special(601));
    let wrong = r#"{"added_tokens_decoder": {"777": {"content": "<new>", "special": true}}}"#;
    assert!(refusal(&tokenizer, wrong).1.contains("777"));
}

#[test]
fn catastrophic_split_pattern_ends_in_an_error() {
    let json = edited("qwen_like", |json| {
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"(?:(a+)+\1b|x)".into();
    });
    let tokenizer = Tokenizer::new(&json, "").expect("loads");
    let start = std::time::Instant::now();
    let result = tokenizer.encode(&"a".repeat(4000), false, &Limits::default());
    assert!(result.is_err());
    assert!(start.elapsed().as_secs() < 60);
}
