//! Writes headers and shard indexes piece by piece, so that those of a million names are never in memory as a whole.

use std::io::Write;

use super::Dtype;
use crate::error::{Error, Result};
use crate::memory;

/// Writes the entries of a header, or the lines of a shard index. Each begins with a comma.
///
/// A method that fails with [`Error::Memory`] has written nothing.
///
/// ```
/// use pdrs_core::safetensors::{Dtype, HeaderWriter};
///
/// let mut writer = HeaderWriter::default();
/// writer.push("x", HeaderWriter::like(Dtype::F32, &[2]).as_str(), 0, 8)?;
/// assert_eq!(writer.take(), br#","x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#);
/// # Ok::<(), pdrs_core::Error>(())
/// ```
#[derive(Default)]
pub struct HeaderWriter {
    bytes: Vec<u8>,
}

impl HeaderWriter {
    /// Reserves memory for so many tensors, whose names have so many bytes together.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn reserve(&mut self, tensors: usize, name_bytes: usize) -> Result<()> {
        memory::reserve(&mut self.bytes, tensors.saturating_mul(80).saturating_add(name_bytes))
    }

    /// The text between the name and the offsets of a tensor of this dtype and shape.
    #[must_use]
    pub fn like(dtype: Dtype, shape: &[u64]) -> String {
        let sizes: Vec<_> = shape.iter().map(u64::to_string).collect();
        format!(":{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[", dtype.name(), sizes.join(","))
    }

    /// Adds a tensor whose data lie from `start` to `stop`. [`like`](Self::like) gives the text of its dtype and shape.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn push(&mut self, name: &str, like: &str, start: u64, stop: u64) -> Result<()> {
        // No character needs more than six bytes, and no number more than 20 digits.
        self.room_for(6 * name.len() + like.len() + 48)?;
        self.bytes.push(b',');
        self.string(name);
        self.bytes.extend_from_slice(like.as_bytes());
        // To write into memory that is there cannot fail.
        let _ = write!(self.bytes, "{start},{stop}]}}");
        Ok(())
    }

    /// The number of bytes that [`push`](Self::push) writes.
    #[must_use]
    pub fn bytes_of(name: &str, like: &str, start: u64, stop: u64) -> usize {
        let digits = |number: u64| number.checked_ilog10().unwrap_or(0) as usize + 1;
        let escapes = name.bytes().filter(|byte| is_special(*byte)).map(|byte| if byte < 0x20 { 5 } else { 1 });
        // A comma, two quotes, another comma, and two brackets.
        name.len() + escapes.sum::<usize>() + like.len() + digits(start) + digits(stop) + 6
    }

    /// Adds a line of a [shard index](super::ShardIndex): the file that a name is in.
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

    /// Returns what was written since the last call.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    fn room_for(&mut self, bytes: usize) -> Result<()> {
        self.bytes.try_reserve(bytes).map_err(|_| Error::Memory)
    }

    fn string(&mut self, text: &str) {
        self.bytes.push(b'"');
        // Without an early end, so that the compiler looks at many bytes at once.
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
}

/// Whether a byte of a string must be escaped.
fn is_special(byte: u8) -> bool {
    matches!(byte, 0..0x20 | b'"' | b'\\')
}
