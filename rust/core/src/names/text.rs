//! UTF-8 in which surrogates may stand, too, as Python's error handler `surrogatepass` writes them.
//!
//! A Python `str` may hold half of a surrogate pair, which a Rust string may not.

/// Appends a character in UTF-8, or a surrogate as if it were one.
pub fn push_character(character: u32, bytes: &mut Vec<u8>) {
    let tail = |shift: u32| 0x80 | (character >> shift & 0x3f) as u8;
    match character {
        0..0x80 => bytes.push(character as u8),
        0x80..0x800 => bytes.extend([0xc0 | (character >> 6) as u8, tail(0)]),
        0x800..0x1_0000 => bytes.extend([0xe0 | (character >> 12) as u8, tail(6), tail(0)]),
        _ => bytes.extend([0xf0 | (character >> 18) as u8, tail(12), tail(6), tail(0)]),
    }
}

/// The position of the first byte that is neither UTF-8 nor part of a surrogate; `None` if there is none.
#[must_use]
pub fn invalid_at(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&text[at..]) {
            Ok(_) => return None,
            Err(error) => {
                at += error.valid_up_to();
                match text[at..] {
                    [0xed, 0xa0..=0xbf, 0x80..=0xbf, ..] => at += 3,
                    _ => return Some(at),
                }
            }
        }
    }
}

/// Something that says what a name is: its bytes in UTF-8, where surrogates may stand, too.
pub trait Text {
    /// Hands over the bytes.
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R;

    /// Whether the other has the same bytes.
    fn is_same(&self, other: &Self) -> bool {
        self.with_utf8(|one| other.with_utf8(|other| one == other))
    }

    /// Begins to load what [`with_utf8`](Self::with_utf8) will read.
    fn prefetch(&self) {}

    /// Begins to load what lies at a place: a hint that this crate cannot give, for it has no unsafe code.
    fn prefetch_place<T>(_place: &T) {}
}

impl Text for [u8] {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        take(self)
    }
}

impl<T: Text + ?Sized> Text for &T {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        (**self).with_utf8(take)
    }

    fn is_same(&self, other: &Self) -> bool {
        (**self).is_same(*other)
    }

    fn prefetch(&self) {
        (**self).prefetch();
    }

    fn prefetch_place<P>(place: &P) {
        T::prefetch_place(place);
    }
}

impl Text for str {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        take(self.as_bytes())
    }
}

impl Text for String {
    fn with_utf8<R>(&self, take: impl FnOnce(&[u8]) -> R) -> R {
        take(self.as_bytes())
    }
}
