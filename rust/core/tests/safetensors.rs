//! The reader of safetensors headers against `serde_json`, on headers that are right, nearly right, and neither.
//!
//! The bugs that this hunts: a damaged header that is believed, a size that overflows into a small one, bytes that two
//! tensors share, a good header that is refused because it is written in another way, an error that does not say where,
//! a copy that puts a row into the place of another.

mod header_model;

use header_model::{check, header_of};
use pdrs_core::safetensors::{Dtype, Fault, Header, HeaderWriter, Stack};
use proptest::prelude::*;

fn read(header: &str, data: u64) -> Result<Header, String> {
    Header::read(header.as_bytes(), 8 + header.len() as u64 + data).map_err(|error| error.to_string())
}

/// Asserts that a header is refused with these words, and where the mark `^` stands in it.
#[track_caller]
fn refused(marked: &str, data: u64, said: &str) {
    let header = marked.replacen('^', "", 1);
    let at = 8 + marked.find('^').expect("a mark");
    let error = read(&header, data).err().expect("is refused");
    assert_eq!(error, format!("{said} (byte {at})"), "{header}");
    check(header.as_bytes(), data);
}

fn tensor(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}"#)
}

fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!("{{{}}}", tensor("x", dtype, shape, offsets))
}

#[test]
fn a_header_may_be_written_in_any_way_that_json_allows() {
    for header in [
        "{}".to_owned(),
        "{ \t\r\n}   ".to_owned(),
        one("F32", "2,3", "0,24"),
        one("F4", "2,3", "0,3"),
        one("F32", "0,72057594037927936", "0,0"),
        format!("{{{},{}}}", tensor("b", "I64", "", "4,12"), tensor("", "F16", "2", "0,4")),
        format!("{{{},{}}}", tensor("full", "U8", "4", "0,4"), tensor("none", "U8", "0", "0,0")),
        r#"{ "x" : { "shape" : [ 1 , 2 ] , "data_offsets" : [ 0 , 8 ] , "dtype" : "F32" } , "__metadata__" : null }"#
            .into(),
        r#"{"\u0078\ud83d\ude00\n\"\/\\":{"d\u0074ype":"F\u00332","shape":[],"data_offsets":[0,4]}}"#.into(),
        r#"{"x":{"new":[{"a":[1,-2.5e+3,true,{}]},"\u00e9",[]],"dtype":"U8","shape":[],"data_offsets":[0,1],"b":{}}}"#
            .into(),
        r#"{"__metadata__":{},"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#.into(),
    ] {
        let data = [0, 1, 3, 4, 8, 12, 24].into_iter().find(|data| read(&header, *data).is_ok());
        check(header.as_bytes(), data.unwrap_or_else(|| panic!("{header}")));
    }
}

#[test]
fn what_is_wrong_and_where_is_said() {
    refused("^", 0, "no safetensors file: its header does not begin with a brace");
    refused("^ {}", 0, "no safetensors file: its header does not begin with a brace");
    refused("{} ^x", 0, "something follows the end of the header");
    refused("{^", 0, "expected '\"'");
    refused(r#"{"x^"#, 0, "the header ends within a string");
    refused(r#"{"x":^7}"#, 0, "tensor \"x\": expected '{'");
    refused(r#"{"x"^:{}}"#, 0, "tensor \"x\": 'dtype' is missing");
    refused(r#"{"x"^:{"dtype":"U8","data_offsets":[0,1]}}"#, 0, "tensor \"x\": 'shape' is missing");
    refused(r#"{"x"^:{"dtype":"U8","shape":[]}}"#, 0, "tensor \"x\": 'data_offsets' is missing");
    refused(&format!("{{{},^}}", tensor("a", "U8", "4", "0,4")), 4, "expected '\"'");
    refused("{\"a^\nb\":{}}", 0, "a control character stands in a string");
    refused(r#"{"^\x":{}}"#, 0, "an escape sequence that JSON does not have");
    refused(r#"{"^\u00g0":{}}"#, 0, "an escape sequence that JSON does not have");
    refused(r#"{"^\ud800\u0041":{}}"#, 0, "half of a surrogate pair, which is no character");
    refused(r#"{"^\ude00":{}}"#, 0, "half of a surrogate pair, which is no character");
    refused(&one("^F33", "1", "0,4").replace("\"^", "^\""), 4, "tensor \"x\": the dtype 'F33' is unknown");
    for number in ["^-1", "^1.0", "^01", "^1e3", "^,", "^null"] {
        refused(&one("F32", number, "0,4"), 4, "tensor \"x\": expected a whole number, 0 or larger");
    }
    refused(&one("F32", "^18446744073709551616", "0,4"), 4, "tensor \"x\": a number of more than 64 bits");
    for (shape, offsets) in [
        ("4294967296,4294967296", "0,0"),
        ("2305843009213693952", "0,9223372036854775808"),
        ("0,2305843009213693952", "0,0"),
        ("18446744073709551615", "0,18446744073709551615"),
    ] {
        let header = one("F32", &format!("^{shape}"), offsets).replace("[^", "^[");
        refused(&header, 0, "tensor \"x\": the shape has more elements than can be counted");
    }
    let shape = |header: String| header.replace("\"shape\":", "\"shape\":^");
    refused(&shape(one("F4", "3", "0,2")), 2, "tensor \"x\": the last element does not end with a byte");
    let offsets = |header: String| header.replace("\"data_offsets\":", "\"data_offsets\":^");
    refused(&offsets(one("F32", "2", "0,4")), 4, "tensor \"x\": it lies at 0 to 4 of the data, but needs 8 bytes");
    refused(&offsets(one("F32", "1", "8,4")), 8, "tensor \"x\": it lies at 8 to 4 of the data, but needs 4 bytes");
    refused(
        &offsets(one("F32", "1", "18446744073709551615,3")),
        8,
        "tensor \"x\": it lies at 18446744073709551615 to 3 of the data, but needs 4 bytes",
    );
    let deep = format!(r#"{{"x":{{"new":{}^{}1{}}}}}"#, "[".repeat(64), "[".repeat(100_000), "]".repeat(100_064));
    refused(&deep, 0, "tensor \"x\": values are nested too deeply");
    let ones = format!("{},^1", vec!["1"; 64].join(","));
    refused(&one("U8", &ones, "0,1"), 1, "tensor \"x\": the shape has more than 64 dimensions");
    refused(r#"{"__metadata__":{"a":^1}}"#, 0, "expected '\"'");
    refused(r#"{"__metadata__":{"a":"",^"a":""}}"#, 0, "a key of the metadata is listed twice");
    refused(r#"{"__metadata__":{},^"__metadata__":{}}"#, 0, "a key of the metadata is listed twice");
    refused(
        r#"{"x":{"dtype":"U8",^"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#,
        1,
        "tensor \"x\": 'dtype' is given twice",
    );
    let error = Header::read(b"{\"\xff\":{}}", 100).err().unwrap();
    assert_eq!((error.fault, error.at), (Fault::NotUtf8, 10));
}

#[test]
fn tensors_that_do_not_share_out_the_data_are_refused() {
    let a = tensor("a", "U8", "4", "0,4");
    let whole = |second: &str| format!("{{{a},^{second}}}");
    refused(&format!("{{^{a}}}"), 3, "tensor \"a\": it ends at 4 of the data, of which the file has only 3 bytes");
    refused(
        &whole(&tensor("b", "U8", "4", "3,7")),
        7,
        "tensor \"b\": it begins at 3 of the data, where another tensor lies that ends at 4",
    );
    refused(
        &whole(&tensor("b", "U8", "0", "3,3")),
        4,
        "tensor \"b\": it begins at 3 of the data, where another tensor lies that ends at 4",
    );
    refused(&whole(&tensor("b", "U8", "4", "5,9")), 9, "tensor \"b\": the data from 4 to 5 belong to no tensor");
    refused(&whole(&tensor("a", "U8", "4", "4,8")), 8, "tensor \"a\": the name is listed twice");
    refused(&whole(&tensor("\\u0061", "U8", "4", "4,8")), 8, "tensor \"a\": the name is listed twice");
    refused(&format!("{{{a}}}^"), 6, "the data from 4 to 6 belong to no tensor");
}

#[test]
fn a_tensor_that_is_like_the_one_before_it_is_read_with_the_same_care() {
    let first = tensor("a", "U8", "4", "0,4");
    let like = |offsets: &str| format!("{{{first},{}}}", tensor("b", "U8", "4", offsets));
    for (offsets, said) in [
        ("4,9", "it lies at 4 to 9 of the data, but needs 4 bytes"),
        ("8,4", "it lies at 8 to 4 of the data, but needs 4 bytes"),
        ("18446744073709551615,3", "it lies at 18446744073709551615 to 3 of the data, but needs 4 bytes"),
    ] {
        let header = like(offsets).replace(&format!("[{offsets}]"), &format!("^[{offsets}]"));
        refused(&header, 8, &format!("tensor \"b\": {said}"));
    }
    for number in ["^-4", "^04", "^4.0", "^"] {
        refused(&like(&format!("{number},8")), 8, "tensor \"b\": expected a whole number, 0 or larger");
    }
    refused(&like("4,8").replace("[4,8]", "[4,8^,9]"), 8, "tensor \"b\": expected ']'");
    let twice = like("4,8").replace("[4,8]", "[4,8],^\"dtype\":\"U8\"");
    refused(&twice, 8, "tensor \"b\": 'dtype' is given twice");
    let more = like("4,8").replace("[4,8]", "[4,8],\"new\":1");
    check(more.as_bytes(), 8);
    assert!(read(&more, 8).is_ok());
}

#[test]
fn a_header_of_an_absurd_size_is_refused_before_it_is_read() {
    for (bytes, file, said) in [
        (&b""[..], 0, "no safetensors file: it has 0 bytes, and 8 give the size of the header (byte 0)"),
        (
            &[1, 0, 0, 0, 0, 0, 0, 0],
            8,
            "the header is said to have 1 bytes, and the file has 8: it is truncated or of another kind (byte 0)",
        ),
        (
            &[0, 0, 0, 0, 0, 0, 0, 16],
            1 << 40,
            "the header is said to have 1152921504606846976 bytes, and the file has 1099511627776: it is truncated or of another kind (byte 0)",
        ),
    ] {
        assert_eq!(Header::size(bytes, file).unwrap_err().to_string(), said);
    }
    assert_eq!(
        Header::size(&[0xff; 8], u64::MAX).unwrap_err().fault,
        Fault::TooLong { said: u64::MAX, file: u64::MAX }
    );
    assert_eq!(Header::size(&[200, 0, 0, 0, 0, 0, 0, 0, 9], 208), Ok(200));
}

#[test]
fn an_error_is_short_even_if_the_name_is_long() {
    let name = "\u{e9}".repeat(1 << 20);
    let error = read(&format!(r#"{{"{name}":{{"dtype":"{name}"}}}}"#), 0).err().unwrap();
    assert!(error.len() < 700, "{}", error.len());
}

#[test]
fn a_million_names_are_found_and_their_header_is_written_again_byte_for_byte() {
    let mut writer = HeaderWriter::default();
    let like = HeaderWriter::like(Dtype::F32, &[16]);
    for number in 0..1_000_000 {
        writer.push(&format!("name.{number}"), &like, number * 64, number * 64 + 64).unwrap();
    }
    let entries = writer.take();
    let bytes = header_of(&[], &entries);
    let header = Header::read(&bytes, 8 + bytes.len() as u64 + 64_000_000).unwrap();
    assert_eq!((header.len(), header.kinds().len(), header.data_start()), (1_000_000, 1, 8 + bytes.len() as u64));
    assert_eq!(header.find("name.999999"), Some(999_999));
    assert_eq!(header.find("name.1000000"), None);
    let mut again = HeaderWriter::default();
    again.reserve(1_000_000, 12_000_000).unwrap();
    for number in 0..header.len() {
        let (start, stop) = header.bytes(number);
        again.push(header.name(number), &like, start - header.data_start(), stop - header.data_start()).unwrap();
    }
    assert!(again.take() == entries);
}

/// Names, dtypes and shapes in the order of the header, and the order of the data where it is another.
type File = (Vec<(String, Dtype, Vec<u64>)>, Vec<usize>);

/// Tensors of any names and kinds, in the order of the header, with the order in which their data lie.
fn files() -> impl Strategy<Value = File> {
    let name = prop_oneof![3 => "[a-c.]{0,4}", 1 => any::<String>()];
    let kind = prop_oneof![
        2 => Just((Dtype::F32, vec![2])),
        2 => (prop::sample::select(Dtype::ALL), prop::collection::vec(0_u64..4, 0..4)),
    ];
    prop::collection::vec((name, kind), 0..12)
        .prop_map(|tensors| {
            let whole = tensors.into_iter().map(|(name, (dtype, mut shape))| {
                shape.push(if dtype.bits() < 8 { 4 } else { 1 });
                (name, dtype, shape)
            });
            whole.collect::<Vec<_>>()
        })
        .prop_map(|mut tensors| {
            tensors.sort_by(|one, other| one.0.cmp(&other.0));
            tensors.dedup_by(|one, other| one.0 == other.0);
            tensors.retain(|tensor| tensor.0 != "__metadata__");
            tensors
        })
        .prop_flat_map(|tensors| {
            let order = Just((0..tensors.len()).collect::<Vec<_>>()).prop_shuffle();
            (Just(tensors).prop_shuffle(), prop_oneof![order, Just(Vec::new())])
        })
}

fn written((tensors, order): &File) -> (Vec<u8>, u64) {
    let mut starts = vec![0; tensors.len()];
    let bytes = |at: usize| tensors[at].2.iter().product::<u64>() * tensors[at].1.bits() / 8;
    let mut end = 0;
    for place in 0..tensors.len() {
        let at = order.get(place).copied().unwrap_or(place);
        starts[at] = end;
        end += bytes(at);
    }
    let mut writer = HeaderWriter::default();
    for (at, (name, dtype, shape)) in tensors.iter().enumerate() {
        writer.push(name, &HeaderWriter::like(*dtype, shape), starts[at], starts[at] + bytes(at)).unwrap();
    }
    (header_of(&[("a\"".into(), "\u{1}\\".into())], &writer.take()), end)
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(file in files()) {
        let (header, data) = written(&file);
        let found = Header::read(&header, 8 + header.len() as u64 + data);
        prop_assert!(found.is_ok(), "{:?}", found.err());
        check(&header, data);
    }

    #[test]
    fn a_header_that_was_changed_is_judged_as_serde_judges_it(
        file in files(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..4),
        data_changes in prop::bool::weighted(0.2),
    ) {
        let (mut header, data) = written(&file);
        for (place, byte, what) in changes {
            let place = place.index(header.len());
            // Often one of the bytes that mean something.
            let byte = if byte < 128 { b"\"\\{}[],:0123456789 u/-.ex"[byte as usize % 25] } else { byte };
            match what {
                0 => header[place] = byte,
                1 => header.insert(place, byte),
                2 => drop(header.remove(place)),
                _ => header.truncate(place + 1),
            }
        }
        check(&header, data + u64::from(data_changes));
    }

    #[test]
    fn rows_of_tables_have_the_bytes_of_their_tensors(file in files(), cuts in prop::collection::vec(1_usize..9, 1..5)) {
        let (header, data) = written(&file);
        let found = Header::read(&header, 8 + header.len() as u64 + data).unwrap();
        let bytes: Vec<u8> = (0..data).map(|byte| (byte * 7 % 251) as u8).collect();
        let begin = found.data_start();
        let of = |start: u64, stop: u64| &bytes[(start - begin) as usize..(stop - begin) as usize];
        let stack = Stack::new(&found, |number| number % 5 != 4).unwrap();
        let mut targets: Vec<Vec<u8>> = stack.tables.iter().map(|table| {
            let size = found.kinds()[table.kind].bytes * table.rows;
            vec![0; if table.start.is_none() { size as usize } else { 0 }]
        }).collect();
        let mut cuts = cuts.iter().cycle();
        for (start, stop) in stack.spans(&found, 2).unwrap() {
            let mut at = start;
            while at < stop {
                let end = stop.min(at + *cuts.next().unwrap() as u64);
                let mut slices: Vec<_> = targets.iter_mut().map(|target| &mut target[..]).collect();
                stack.copy_block(&found, of(at, end), at, &mut slices);
                at = end;
            }
        }
        prop_assert_eq!(stack.tensors.len(), found.len() - found.len() / 5);
        for (place, &tensor) in stack.tensors.iter().enumerate() {
            let table = &stack.tables[stack.table_of[place] as usize];
            prop_assert_eq!(table.kind, found.kind_number(tensor));
            prop_assert!(stack.row_of[place] < table.rows);
            let size = found.kind(tensor).bytes;
            let (start, stop) = found.bytes(tensor);
            let row = stack.row_of[place] * size;
            match table.start {
                Some(first) if size > 0 => prop_assert_eq!(first + row, start),
                Some(_) => {}
                None => {
                    let target = &targets[stack.table_of[place] as usize];
                    prop_assert_eq!(&target[row as usize..(row + size) as usize], of(start, stop));
                }
            }
        }
        let rows: std::collections::HashSet<_> = stack.table_of.iter().zip(&stack.row_of).collect();
        prop_assert_eq!(rows.len(), stack.tensors.len(), "each has a row of its own");
    }
}

/// A generator of numbers that needs no crate: the same ones in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// What `fuzz/` does without end and led by coverage: here it is bounded, and led by pieces that headers are made of.
#[test]
fn headers_of_random_pieces_are_judged_as_serde_judges_them() {
    const PIECES: &[&str] = &[
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\\",
        " ",
        "0",
        "1",
        "4",
        "8",
        "16",
        "-",
        ".5",
        "e9",
        "null",
        "true",
        "\"x\":",
        "\"y\":",
        "\"dtype\":",
        "\"F32\"",
        "\"U8\"",
        "\"F4\"",
        "\"shape\":",
        "\"data_offsets\":",
        "[0,4]",
        "[4,8]",
        "[]",
        "\"__metadata__\":",
        "{\"a\":\"b\"}",
        "\\u0041",
        "\\ud83d",
        "\\ude00",
        "\u{e9}",
        "18446744073709551615",
        "4611686018427387904",
        "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}",
        "{\"dtype\":\"U8\",\"shape\":[2,2],\"data_offsets\":[4,8]}",
        "\"new\":",
        "[[[{}]]]",
    ];
    let mut numbers = Numbers(7);
    let mut header = Vec::new();
    for _ in 0..60_000 {
        header.clear();
        header.push(b'{');
        for _ in 0..numbers.below(14) {
            match numbers.below(40) {
                0 => header.push(numbers.next() as u8),
                1 if !header.is_empty() => drop(header.remove(numbers.below(header.len()))),
                _ => header.extend_from_slice(PIECES[numbers.below(PIECES.len())].as_bytes()),
            }
        }
        if numbers.below(4) > 0 {
            header.push(b'}');
        }
        check(&header, [0, 4, 8][numbers.below(3)]);
    }
}
