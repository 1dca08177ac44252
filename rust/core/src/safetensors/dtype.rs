//! The types of elements that the format has.

use super::error::Fault;

macro_rules! dtypes {
    ($($name:ident $bits:literal),* $(,)?) => {
        /// The type of the elements of a tensor, named as in the file.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, missing_docs, reason = "the names are those of the format")]
        pub enum Dtype { $($name),* }

        impl Dtype {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The type of this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $(stringify!($name) => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its name in a file.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),* }
            }

            /// The size of an element in bits.
            #[must_use]
            pub fn bits(self) -> u64 {
                match self { $(Self::$name => $bits),* }
            }
        }
    };
}

dtypes! {
    BOOL 8, F4 4, F6_E2M3 6, F6_E3M2 6, U8 8, I8 8, F8_E5M2 8, F8_E4M3 8, F8_E8M0 8, F8_E4M3FNUZ 8, F8_E5M2FNUZ 8,
    I16 16, U16 16, F16 16, BF16 16, I32 32, U32 32, F32 32, C64 64, F64 64, I64 64, U64 64,
}

impl Dtype {
    /// The bytes of a tensor of a shape.
    ///
    /// # Errors
    ///
    /// If an `i64` cannot count the bits, dimensions of size 0 left out (from which torch computes strides, too), or the
    /// last byte is not used up.
    pub fn bytes_of(self, shape: &[u64]) -> Result<u64, Fault> {
        let elements = shape.iter().try_fold(1_u64, |product, size| product.checked_mul((*size).max(1)));
        let bits =
            elements.and_then(|elements| elements.checked_mul(self.bits())).filter(|bits| i64::try_from(*bits).is_ok());
        match bits {
            None => Err(Fault::Overflow),
            Some(_) if shape.contains(&0) => Ok(0),
            Some(bits) if bits % 8 != 0 => Err(Fault::PartOfByte),
            Some(bits) => Ok(bits / 8),
        }
    }
}
