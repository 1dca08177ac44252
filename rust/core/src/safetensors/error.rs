//! Why a header is refused: what is wrong, with which tensor, at which byte of the file.

use std::fmt;

use crate::error::Error;

/// A header that does not describe its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderError {
    /// What is wrong.
    pub fault: Fault,
    /// The byte of the file where it was noticed.
    pub at: u64,
    /// The tensor that it is about, if that is known.
    pub tensor: Option<String>,
}

/// What can be wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The file is too short to say how long its header is.
    TooShort(u64),
    /// The header would be longer than the file.
    TooLong {
        /// The bytes that it is said to have.
        said: u64,
        /// The bytes that the file has.
        file: u64,
    },
    /// The header does not begin with a brace.
    NoHeader,
    /// The bytes are no UTF-8.
    NotUtf8,
    /// The header ends in the middle of a string.
    Ends,
    /// Another character was expected.
    Expected(char),
    /// A control character stands in a string.
    Control,
    /// An escape sequence that JSON does not have.
    Escape,
    /// Half of a surrogate pair.
    Surrogate,
    /// Something that is no whole number, 0 or larger.
    Number,
    /// A number that needs more than 64 bits.
    LargeNumber,
    /// Something that is no value of JSON.
    Value,
    /// Values within values within values.
    Nested,
    /// Something follows the header that is no space.
    Trailing,
    /// A name that is listed twice.
    Duplicate,
    /// A key of the metadata, or the metadata, that are listed twice.
    DuplicateMetadata,
    /// A field of a tensor that is given twice.
    DuplicateField(&'static str),
    /// A field of a tensor that is not given.
    MissingField(&'static str),
    /// A dtype that the format does not have.
    Dtype(String),
    /// More dimensions than any tensor has.
    Dimensions,
    /// More elements or bytes than can be counted.
    Overflow,
    /// A size that is no whole number of bytes.
    PartOfByte,
    /// The offsets and the shape disagree.
    Size {
        /// Where the tensor begins in the data.
        start: u64,
        /// Where it ends.
        stop: u64,
        /// The bytes that its shape asks for.
        needed: u64,
    },
    /// The tensor lies beyond the end of the file.
    Outside {
        /// Where it ends in the data.
        stop: u64,
        /// The bytes of data that the file has.
        data: u64,
    },
    /// The tensor shares bytes with another.
    Overlaps {
        /// Where it begins in the data.
        start: u64,
        /// Where the one in front of it ends.
        behind: u64,
    },
    /// Bytes that belong to no tensor.
    Hole {
        /// Where they begin in the data.
        start: u64,
        /// Where they end.
        stop: u64,
    },
    /// More tensors than can be counted.
    Full(usize),
    /// There is no memory for what the header says.
    Memory,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort(size) => {
                write!(f, "no safetensors file: it has {size} bytes, and 8 give the size of the header")
            }
            Self::TooLong { said, file } => {
                write!(
                    f,
                    "the header is said to have {said} bytes, and the file has {file}: it is truncated or of another kind"
                )
            }
            Self::NoHeader => write!(f, "no safetensors file: its header does not begin with a brace"),
            Self::NotUtf8 => write!(f, "the header is not in UTF-8"),
            Self::Ends => write!(f, "the header ends within a string"),
            Self::Expected(character) => write!(f, "expected '{character}'"),
            Self::Control => write!(f, "a control character stands in a string"),
            Self::Escape => write!(f, "an escape sequence that JSON does not have"),
            Self::Surrogate => write!(f, "half of a surrogate pair, which is no character"),
            Self::Number => write!(f, "expected a whole number, 0 or larger"),
            Self::LargeNumber => write!(f, "a number of more than 64 bits"),
            Self::Value => write!(f, "expected a value"),
            Self::Nested => write!(f, "values are nested too deeply"),
            Self::Trailing => write!(f, "something follows the end of the header"),
            Self::Duplicate => write!(f, "the name is listed twice"),
            Self::DuplicateMetadata => write!(f, "a key of the metadata is listed twice"),
            Self::DuplicateField(field) => write!(f, "'{field}' is given twice"),
            Self::MissingField(field) => write!(f, "'{field}' is missing"),
            Self::Dtype(name) => write!(f, "the dtype '{name}' is unknown"),
            Self::Dimensions => write!(f, "the shape has more than {} dimensions", super::MAX_DIMENSIONS),
            Self::Overflow => write!(f, "the shape has more elements than can be counted"),
            Self::PartOfByte => write!(f, "the last element does not end with a byte"),
            Self::Size { start, stop, needed } => {
                write!(f, "it lies at {start} to {stop} of the data, but needs {needed} bytes")
            }
            Self::Outside { stop, data } => {
                write!(f, "it ends at {stop} of the data, of which the file has only {data} bytes")
            }
            Self::Overlaps { start, behind } => {
                write!(f, "it begins at {start} of the data, where another tensor lies that ends at {behind}")
            }
            Self::Hole { start, stop } => write!(f, "the data from {start} to {stop} belong to no tensor"),
            Self::Memory => write!(f, "out of memory"),
            Self::Full(limit) => write!(f, "there are more than {limit} tensors"),
        }
    }
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tensor {
            Some(name) => write!(f, "tensor {name:?}: {} (byte {})", self.fault, self.at),
            None => write!(f, "{} (byte {})", self.fault, self.at),
        }
    }
}

impl std::error::Error for HeaderError {}

impl From<Error> for Fault {
    fn from(_: Error) -> Self {
        // Nothing else is refused to a header that has no more tensors than can be counted.
        Self::Memory
    }
}

/// A fault and its byte in the header.
pub(super) struct Where {
    pub(super) fault: Fault,
    pub(super) at: usize,
}
