use super::*;

const FOLDER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../configs/teachers/scenes/scorer"
);

fn file(name: &str) -> Vec<u8> {
    std::fs::read(format!("{FOLDER}/{name}")).expect("the bundled teacher's scorer is there")
}

fn rules() -> Rules {
    Rules::from_json(&file("scorer.json")).expect("the bundled rules are valid")
}

/// RFC 4648, for the fixture alone.
fn from_base64(text: &str) -> Vec<u8> {
    let value = |c: u8| -> u32 {
        match c {
            b'A'..=b'Z' => u32::from(c - b'A'),
            b'a'..=b'z' => u32::from(c - b'a') + 26,
            b'0'..=b'9' => u32::from(c - b'0') + 52,
            b'+' => 62,
            b'/' => 63,
            other => panic!("{other} is no base 64"),
        }
    };
    let digits: Vec<u8> = text.bytes().filter(|&c| c != b'=').collect();
    digits
        .chunks(4)
        .flat_map(|chunk| {
            let word = chunk.iter().fold(0, |w, &c| w << 6 | value(c)) << (6 * (4 - chunk.len()));
            word.to_be_bytes()[1..chunk.len()].to_vec()
        })
        .collect()
}

/// The reference implementation made these cases; every single verdict must agree.
#[test]
fn every_verdict_agrees_with_the_reference() {
    let golden: serde_json::Value = serde_json::from_slice(&file("golden.json")).expect("JSON");
    let rules = rules();
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 20, "the oracle has {} cases", cases.len());
    for case in cases {
        let caption = case["caption"].as_str().expect("a caption");
        let picture = Picture {
            width: golden["width"].as_u64().expect("a width") as usize,
            height: golden["height"].as_u64().expect("a height") as usize,
            rgb: from_base64(case["pixels"].as_str().expect("pixels")),
        };
        let expected: Vec<bool> = case["verdicts"]
            .as_array()
            .expect("verdicts")
            .iter()
            .map(|v| v[1].as_bool().expect("a truth"))
            .collect();
        assert_eq!(
            verdicts(&rules, &caption::read(&rules, caption), &picture),
            expected,
            "{caption}"
        );
        let score = score(&rules, caption, &picture).expect("the right size");
        let number = |name: &str| case[name].as_u64().expect("a number") as u32;
        assert_eq!(
            (score.right, score.total),
            (number("right"), number("total")),
            "{caption}"
        );
    }
}

#[test]
fn a_caption_that_states_nothing_has_no_total() {
    let picture = Picture {
        width: 32,
        height: 32,
        rgb: vec![0; 32 * 32 * 3],
    };
    let score = score(&rules(), "something else", &picture).expect("the right size");
    assert_eq!(score, Score { right: 0, total: 0 });
}

#[test]
fn what_cannot_be_scored_is_refused_by_name() {
    let picture = Picture {
        width: 16,
        height: 16,
        rgb: vec![0; 16 * 16 * 3],
    };
    let error = score(&rules(), "a red disc", &picture).expect_err("too small");
    assert!(error.to_string().contains("(16, 16)"), "{error}");
    let text = String::from_utf8(file("scorer.json")).expect("text");
    let later = text.replacen("\"version\": 1", "\"version\": 2", 1);
    assert!(matches!(
        Rules::from_json(later.as_bytes()),
        Err(Error::Format { version: 2, .. })
    ));
    assert!(matches!(Rules::from_json(b"{}"), Err(Error::Malformed(_))));
    let wide = text.replacen("\"width\": 32", "\"width\": 4096", 1);
    assert!(matches!(
        Rules::from_json(wide.as_bytes()),
        Err(Error::Rule(_))
    ));
}
