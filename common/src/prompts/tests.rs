use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use arrow_array::{Int32Array, LargeStringArray, RecordBatch};

use super::*;

fn file(folder: &tempfile::TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).expect("write a test file");
    path
}

fn texts(prompts: &[Prompt]) -> Vec<&str> {
    prompts.iter().map(Prompt::text).collect()
}

fn some(n: usize) -> Vec<Prompt> {
    (0..n)
        .filter_map(|i| Prompt::new(&format!("prompt {i}")))
        .collect()
}

#[test]
fn white_space_does_not_make_another_prompt() {
    assert_eq!(Prompt::new(" a\t red  disc\r\n"), Prompt::new("a red disc"));
    assert_eq!(Prompt::new(" \t"), None);
    let id = Prompt::new("abc").expect("not blank").id();
    assert_eq!(id[..4], [0xba, 0x78, 0x16, 0xbf]);
}

#[test]
fn blanks_and_repeats_are_left_out_and_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = file(
        &dir,
        "p.txt",
        "\u{feff}a disc\n\n b  ring\nb ring\n\na disc\r\nlast",
    );
    let (prompts, report) = load(&path).expect("a list");
    assert_eq!(texts(&prompts), ["a disc", "b ring", "last"]);
    assert_eq!(report.blank, Some(Skipped { count: 2, first: 2 }));
    assert_eq!(report.duplicate, Some(Skipped { count: 2, first: 4 }));
    let told = report.to_string();
    assert!(told.ends_with("p.txt: 3 prompts, 2 blank left out (first: line 2), 2 repeated left out (first: line 4)"), "{told}");
}

#[test]
fn json_lines_hold_the_text_under_one_of_three_keys() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = file(
        &dir,
        "p.jsonl",
        "{\"prompt\": \"a\"}\n{\"text\": \"b\", \"n\": 1}\n{\"caption\": \"c\"}\n{\"prompt\": null}\n",
    );
    let (prompts, report) = load(&path).expect("a list");
    assert_eq!(texts(&prompts), ["a", "b", "c"]);
    assert_eq!(report.blank, Some(Skipped { count: 1, first: 4 }));
}

#[test]
fn parquet_columns_of_text_are_found_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = |name: &str| {
        let ids: arrow_array::ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
        let text: arrow_array::ArrayRef =
            Arc::new(LargeStringArray::from(vec![Some("x"), None, Some("y")]));
        let batch = RecordBatch::try_from_iter([("id", ids), (name, text)]).expect("a batch");
        let mut bytes = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a writer");
        writer.write(&batch).expect("write");
        writer.close().expect("close");
        bytes
    };
    let (prompts, report) = load(&file(&dir, "p.parquet", rows("caption"))).expect("a list");
    assert_eq!(texts(&prompts), ["x", "y"]);
    assert_eq!(report.blank, Some(Skipped { count: 1, first: 2 }));
    let error = load(&file(&dir, "q.parquet", rows("other"))).expect_err("no column");
    assert!(
        error
            .to_string()
            .ends_with("no column prompt, text, caption; it has id, other"),
        "{error}"
    );
}

#[test]
fn files_that_cannot_be_read_say_where_and_why() {
    let dir = tempfile::tempdir().expect("a folder");
    let long = "x".repeat(70_000);
    for (name, bytes, told) in [
        ("a.txt", &b"ok\n\xff\xfe\n"[..], "line 2: not UTF-8"),
        ("b.txt", long.as_bytes(), "line 1: longer than 65536 bytes"),
        ("c.txt", b"\n \n", "holds no prompts"),
        (
            "d.jsonl",
            b"{\"prompt\": \"a\"}\nplain text\n",
            "line 2: not JSON",
        ),
        (
            "e.jsonl",
            b"{\"promt\": \"a\"}\n",
            "line 1: none of the keys prompt, text, caption",
        ),
        (
            "f.jsonl",
            b"{\"prompt\": 3}\n",
            "line 1: the prompt is not text",
        ),
        ("g.jsonl", b"[1]\n", "not a JSON object"),
        (
            "h.parquet",
            b"PAR1 but not really PAR1",
            "is not a readable Parquet file",
        ),
        ("i.csv", b"a,b\n", "expected .txt, .jsonl or .parquet"),
    ] {
        let error = load(&file(&dir, name, bytes)).expect_err(name).to_string();
        assert!(error.contains(told), "{name}: {error}");
    }
    assert!(matches!(
        load(Path::new("/nowhere/p.txt")),
        Err(Error::Unreadable { .. })
    ));
}

#[test]
fn a_share_is_held_out_by_text_and_seed_alone() {
    let (train, holdout) = hold_out(some(4000), 0.1, 7);
    assert_eq!(train.len() + holdout.len(), 4000);
    assert!((320..480).contains(&holdout.len()), "{}", holdout.len());
    let (_, of_fewer) = hold_out(some(2000), 0.1, 7);
    assert_eq!(of_fewer, holdout[..of_fewer.len()]);
    assert_ne!(hold_out(some(4000), 0.1, 8).1, holdout);
    assert!(hold_out(some(10), 0.0, 7).1.is_empty());
    assert_eq!(hold_out(some(10), 1e-9, 7).1.len(), 1);
}

#[test]
fn held_out_files_are_kept_from_training() {
    let dir = tempfile::tempdir().expect("a folder");
    let prompts = recipe::Prompts {
        train: file(&dir, "t.txt", "a\nb\nc\n"),
        holdout: Holdout::File(file(&dir, "h.txt", "b\nz\n")),
        preview: None,
    };
    let lists = load_lists(&prompts, 1).expect("lists");
    assert_eq!(texts(&lists.train), ["a", "c"]);
    assert_eq!(texts(&lists.preview), ["b", "z"]);
    assert_eq!((lists.reports[0].kept, lists.reports[0].held_out), (2, 1));

    let all = recipe::Prompts {
        holdout: Holdout::File(prompts.train.clone()),
        ..prompts
    };
    assert!(matches!(load_lists(&all, 1), Err(Error::AllHeldOut { .. })));
}

#[test]
fn every_pass_uses_every_prompt_once_in_an_order_of_its_own() {
    let pass = |k: u64| {
        (0..50)
            .map(|i| prompt_of(k * 50 + i, 50, 3))
            .collect::<Vec<_>>()
    };
    for k in 0..3 {
        let mut seen = pass(k);
        seen.sort_unstable();
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
    }
    assert_ne!(pass(0), pass(1));
}

#[test]
fn stored_lists_come_back_and_are_the_same_bytes() {
    let prompts = some(1000);
    let bytes = to_parquet(&prompts);
    assert_eq!(bytes, to_parquet(&prompts));
    assert_eq!(from_parquet(&bytes).expect("a list"), prompts);
    assert!(
        from_parquet(&to_parquet(&[]))
            .expect("an empty list")
            .is_empty()
    );
    let mut cut = bytes.to_vec();
    cut.truncate(500);
    assert!(from_parquet(&cut.into()).is_err());
}

#[test]
fn a_stored_text_must_have_its_own_id() {
    let bytes = to_parquet(&some(3));
    let at = bytes
        .windows(8)
        .position(|w| w == b"prompt 1")
        .expect("the text is plain");
    let mut forged = bytes.to_vec();
    forged[at + 7] = b'7';
    let error = from_parquet(&forged.into()).expect_err("another text");
    assert!(error.to_string().contains("another id"), "{error}");
}

/// A file of `tests/fixtures/prompts`, made by pyarrow.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/prompts/{name}.parquet"))
}

/// What reading `bytes` as a Parquet file comes to.
fn load_parquet(bytes: impl AsRef<[u8]>) -> Result<(Vec<Prompt>, Report), Error> {
    let dir = tempfile::tempdir().expect("a folder");
    load(&file(&dir, "p.parquet", bytes))
}

#[test]
fn files_of_every_usual_codec_hold_the_same_prompts() {
    let captions: Vec<String> = (0..40)
        .filter(|&n| n != 7)
        .map(|n| {
            format!(
                "caption {n}: a café in the {}at night",
                "rain ".repeat(n % 5)
            )
        })
        .collect();
    for name in [
        "none",
        "snappy",
        "zstd",
        "gzip",
        "lz4",
        "brotli",
        "zstd-v2",
        "snappy-pages",
    ] {
        let (prompts, report) = load(&fixture(name)).expect(name);
        assert_eq!(texts(&prompts), captions, "{name}");
        assert_eq!(report.blank, Some(Skipped { count: 1, first: 8 }), "{name}");
    }
    let (prompts, report) = load(&fixture("required")).expect("a column without nulls");
    assert_eq!((prompts.len(), report.blank), (40, None));
}

#[test]
fn what_cannot_be_read_of_a_parquet_file_is_named_with_a_way_out() {
    let delta = load(&fixture("delta"))
        .expect_err("a delta encoding")
        .to_string();
    assert!(
        delta.contains("delta.parquet is not") && delta.contains("write them plain"),
        "{delta}"
    );
    let list = load(&fixture("list")).expect_err("a list").to_string();
    assert!(list.contains("column caption does not hold text"), "{list}");
    // The codec's number stands in the footer alone: from 1 (snappy) to 3 (lzo).
    let mut lzo = fs::read(fixture("required")).expect("a fixture");
    let footer = footer_start(&lzo);
    let codec = [b"text\x15\x02", b"text\x15\x06"];
    replace(&mut lzo, footer, codec[0], codec[1]);
    let lzo = load_parquet(lzo).expect_err("lzo").to_string();
    assert!(
        lzo.contains("column text is compressed with lzo") && lzo.contains("zstd, gzip"),
        "{lzo}"
    );
}

fn footer_start(parquet: &[u8]) -> usize {
    let end = parquet.len() - 8;
    let len = parquet[end..end + 4].try_into().expect("four bytes");
    end - u32::from_le_bytes(len) as usize
}

/// Puts `new` in the place of the only `old` behind `from`, and keeps the length of the footer true.
fn replace(parquet: &mut Vec<u8>, from: usize, old: &[u8], new: &[u8]) {
    let places: Vec<usize> = (from..parquet.len() - old.len())
        .filter(|&at| parquet[at..].starts_with(old))
        .collect();
    assert_eq!(places.len(), 1, "{old:?} is at {places:?}");
    let footer = footer_start(parquet);
    parquet.splice(places[0]..places[0] + old.len(), new.iter().copied());
    let end = parquet.len() - 8;
    let footer = if places[0] < footer {
        footer + new.len() - old.len()
    } else {
        footer
    };
    parquet[end..end + 4].copy_from_slice(&((end - footer) as u32).to_le_bytes());
}

/// A number as Thrift's compact form writes it.
fn thrift(number: u64) -> Vec<u8> {
    let mut left = number << 1;
    let mut bytes = Vec::new();
    while left > 0x7f {
        bytes.push(left as u8 | 0x80);
        left >>= 7;
    }
    bytes.push(left as u8);
    bytes
}

#[test]
fn a_small_file_that_claims_to_be_large_is_refused() {
    // Two kilobytes that decompress to a page of 64 MB: read, and found to be no prompt.
    let long = fs::read(fixture("long")).expect("a fixture");
    assert!(long.len() < 2500);
    let error = load_parquet(&long).expect_err("too long").to_string();
    assert!(
        error.contains("row 1 is longer than 65536 bytes"),
        "{error}"
    );

    let with_column = |bytes: u64| {
        let mut forged = long.clone();
        let from = footer_start(&forged);
        // Fields 5 and 6 of the column's description: one row, and its bytes.
        let field = |bytes| [&[0x16, 2, 0x16][..], &thrift(bytes)].concat();
        replace(&mut forged, from, &field(64_000_035), &field(bytes));
        load_parquet(forged)
            .expect_err("a column too large")
            .to_string()
    };
    let error = with_column(100_000_000_000);
    assert!(
        error.contains("states 100000000000 bytes of text, and at most 4294967296"),
        "{error}"
    );

    let mut page = long.clone();
    replace(&mut page, 0, &thrift(64_000_010), &thrift(2_000_000_000));
    let error = load_parquet(page)
        .expect_err("a page too large")
        .to_string();
    assert!(
        error.contains("a page of 2000000000 bytes is longer than 268435456"),
        "{error}"
    );

    let mut lying = long.clone();
    replace(&mut lying, 0, &thrift(64_000_010), &thrift(64_000_000));
    let error = load_parquet(lying)
        .expect_err("more than it says")
        .to_string();
    assert!(
        error.contains("holds more than the 64000000 bytes that it states"),
        "{error}"
    );
}

/// Neither a panic nor an allocation that a header alone asked for; what is still read may be wrong, since Parquet
/// keeps no checksum here.
#[test]
fn no_flipped_bit_and_no_cut_breaks_the_reader() {
    for name in ["snappy", "gzip", "zstd-v2", "brotli", "lz4"] {
        let whole = fs::read(fixture(name)).expect("a fixture");
        let dir = tempfile::tempdir().expect("a folder");
        let path = file(&dir, "p.parquet", &whole);
        let open = fs::File::options().write(true).open(&path).expect("open");
        for (at, byte) in (0..).zip(&whole) {
            // In place, because a file that is cut to nothing first is flushed to the disk.
            open.write_all_at(&[byte ^ 1 << (at % 8)], at)
                .expect("write");
            let _ = load(&path);
            open.write_all_at(&[*byte], at).expect("write");
        }
        assert_eq!(load(&path).expect("as before").0.len(), 39);
        for end in (0..whole.len()).step_by(7) {
            assert!(load_parquet(&whole[..end]).is_err(), "{name} cut at {end}");
        }
    }
}
