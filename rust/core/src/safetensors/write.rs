//! Writes headers.

use super::{Dtype, METADATA};
use crate::error::{Error, Result};
use crate::memory;

/// Writes a header, one tensor after another.
///
/// Whatever writes fails with [`Error::Memory`] where there is none, and has written nothing then.
///
/// ```
/// use pdrs_core::safetensors::{Dtype, HeaderWriter};
///
/// let mut writer = HeaderWriter::new(&[("format", "pt")])?;
/// writer.push("x", HeaderWriter::like(Dtype::F32, &[2]).as_str(), 0, 8)?;
/// let text = br#"{"__metadata__":{"format":"pt"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
/// assert_eq!(writer.finish(8)?[8..][..text.len()], text[..]);
/// # Ok::<(), pdrs_core::Error>(())
/// ```
pub struct HeaderWriter {
    /// The size of the header will stand in its first bytes.
    bytes: Vec<u8>,
    /// The number that was written last.
    last: Digits,
}

impl HeaderWriter {
    /// Begins a header with metadata, which are left out if there are none.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(metadata: &[(&str, &str)]) -> Result<Self> {
        let mut writer = Self { bytes: vec![0; 8], last: Digits::of(0) };
        writer.room_for(metadata.iter().map(|(key, value)| quoted(key) + quoted(value) + 2).sum::<usize>() + 64)?;
        writer.bytes.push(b'{');
        if !metadata.is_empty() {
            writer.string(METADATA);
            writer.bytes.extend_from_slice(b":{");
            for (key, value) in metadata {
                writer.separate();
                writer.string(key);
                writer.bytes.push(b':');
                writer.string(value);
            }
            writer.bytes.push(b'}');
        }
        Ok(writer)
    }

    /// Makes room for so many bytes, which are then written without a look at it.
    fn room_for(&mut self, bytes: usize) -> Result<()> {
        self.bytes.try_reserve(bytes).map_err(|_| Error::Memory)
    }

    /// Makes room for as many tensors, whose names have so many bytes together.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn reserve(&mut self, tensors: usize, name_bytes: usize) -> Result<()> {
        memory::reserve(&mut self.bytes, tensors.saturating_mul(80).saturating_add(name_bytes))
    }

    /// What stands between the name and the offsets of tensors of this kind.
    #[must_use]
    pub fn like(dtype: Dtype, shape: &[u64]) -> String {
        let sizes: Vec<_> = shape.iter().map(u64::to_string).collect();
        format!(":{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[", dtype.name(), sizes.join(","))
    }

    /// Adds a tensor that lies at `start` to `stop` of the data, of a kind for which [`like`](Self::like) gave the text.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn push(&mut self, name: &str, like: &str, start: u64, stop: u64) -> Result<()> {
        // No character needs more than six bytes, and no number more than 20 digits.
        self.room_for(6 * name.len() + like.len() + 48)?;
        self.separate();
        self.string(name);
        self.bytes.extend_from_slice(like.as_bytes());
        self.number(start);
        self.bytes.push(b',');
        self.number(stop);
        self.bytes.extend_from_slice(b"]}");
        Ok(())
    }

    /// Hands out what has been written since the last time, for headers that are too large to be kept whole.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// Goes on behind tensors that have been written elsewhere.
    #[must_use]
    pub fn behind_others() -> Self {
        Self { bytes: Vec::new(), last: Digits::of(0) }
    }

    /// Writes which file a name is in, on a line of an [index](super::ShardIndex) behind others.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn push_line(&mut self, name: &str, file: &str) -> Result<()> {
        self.room_for(6 * (name.len() + file.len()) + 16)?;
        self.bytes.extend_from_slice(b",\n    ");
        self.string(name);
        self.bytes.extend_from_slice(b": ");
        self.string(file);
        Ok(())
    }

    /// Ends the header: its size in front, and spaces up to a multiple of `alignment` behind it.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    ///
    /// # Panics
    ///
    /// If `alignment` is 0.
    pub fn finish(mut self, alignment: usize) -> Result<Vec<u8>> {
        memory::reserve(&mut self.bytes, alignment.saturating_add(1))?;
        self.bytes.push(b'}');
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), b' ');
        let size = (self.bytes.len() - 8) as u64;
        self.bytes[..8].copy_from_slice(&size.to_le_bytes());
        Ok(self.bytes)
    }

    /// The bytes that [`push`](Self::push) writes.
    #[must_use]
    pub fn bytes_of(name: &str, like: &str, start: u64, stop: u64) -> usize {
        let digits = |number: u64| number.checked_ilog10().unwrap_or(0) as usize + 1;
        // A comma in front, one between the numbers, brackets behind.
        quoted(name) + like.len() + digits(start) + digits(stop) + 4
    }

    fn separate(&mut self) {
        if self.bytes.last() != Some(&b'{') {
            self.bytes.push(b',');
        }
    }

    fn string(&mut self, text: &str) {
        self.bytes.push(b'"');
        // All bytes are looked at, because that goes many at a time.
        let special = text.bytes().fold(0, |any, byte| any | u8::from(is_special(byte)));
        if special == 0 {
            self.bytes.extend_from_slice(text.as_bytes());
        } else {
            self.escaped(text);
        }
        self.bytes.push(b'"');
    }

    #[cold]
    fn escaped(&mut self, text: &str) {
        for byte in text.bytes() {
            match byte {
                b'"' | b'\\' => self.bytes.extend_from_slice(&[b'\\', byte]),
                0..0x20 => self.bytes.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
                _ => self.bytes.push(byte),
            }
        }
    }

    fn number(&mut self, value: u64) {
        // Where one tensor ends, the next one usually begins.
        if value != self.last.value {
            self.last = Digits::of(value);
        }
        self.bytes.extend_from_slice(&self.last.text[self.last.first..]);
    }
}

/// The bytes of a string with its quotes.
fn quoted(text: &str) -> usize {
    let special = text.bytes().filter(|byte| is_special(*byte));
    text.len() + 2 + special.map(|byte| if byte < 0x20 { 5 } else { 1 }).sum::<usize>()
}

/// A number in decimal.
struct Digits {
    value: u64,
    text: [u8; 20],
    /// Where the digits begin.
    first: usize,
}

impl Digits {
    fn of(value: u64) -> Self {
        let (mut text, mut first, mut left) = ([b'0'; 20], 19, value);
        loop {
            text[first] = b'0' + (left % 10) as u8;
            left /= 10;
            if left == 0 {
                return Self { value, text, first };
            }
            first -= 1;
        }
    }
}

/// Whether a byte of a string must be escaped.
fn is_special(byte: u8) -> bool {
    matches!(byte, 0..0x20 | b'"' | b'\\')
}
