//! Reads JSON from left to right, as far as headers need it; nothing is built, and nothing recurses.

use super::error::{Fault, Where};
use crate::memory;

/// How deep values may be nested that are passed over.
const DEPTH: usize = 64;

/// A place in a text of JSON.
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

type Result<T> = std::result::Result<T, Where>;

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// The byte that is next to be read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// What has been read from one byte to another.
    pub(super) fn between(&self, start: usize, end: usize) -> &'a str {
        &self.text[start..end]
    }

    /// Goes on at a byte that has been read before.
    pub(super) fn go_back(&mut self, at: usize) {
        self.at = at;
    }

    pub(super) fn fail<T>(&self, fault: Fault) -> Result<T> {
        Err(Where { fault, at: self.at })
    }

    fn next(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    pub(super) fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.next() {
            self.at += 1;
        }
    }

    /// Steps over a byte, and the space in front of it, if it comes next; whether it did.
    pub(super) fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.next() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// Steps over a byte, and the space in front of it.
    pub(super) fn expect(&mut self, byte: u8) -> Result<()> {
        if self.take(byte) { Ok(()) } else { self.fail(Fault::Expected(char::from(byte))) }
    }

    /// Steps over a literal if it comes next; whether it did.
    pub(super) fn take_literal(&mut self, literal: &str) -> bool {
        self.skip_space();
        let found = self.text.as_bytes()[self.at..].starts_with(literal.as_bytes());
        self.at += if found { literal.len() } else { 0 };
        found
    }

    /// Steps to the next element of a list or object that ends with `close`; whether there is one.
    pub(super) fn next_element(&mut self, first: bool, close: u8) -> Result<bool> {
        if self.take(close) {
            return Ok(false);
        }
        if !first {
            self.expect(b',')?;
        }
        Ok(true)
    }

    pub(super) fn at_end(&mut self) -> bool {
        self.skip_space();
        self.at == self.text.len()
    }

    /// The characters of a string: a part of the text or, where something in it is escaped, `buffer`.
    pub(super) fn string<'b>(&mut self, buffer: &'b mut String) -> Result<&'b str>
    where
        'a: 'b,
    {
        self.expect(b'"')?;
        let start = self.at;
        match self.run() {
            Some(b'"') => {
                self.at += 1;
                Ok(&self.text[start..self.at - 1])
            }
            _ => self.escaped_string(start, buffer),
        }
    }

    /// Steps to the next byte that does not stand for itself in a string, and gives it.
    fn run(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let length = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)).unwrap_or(rest.len());
        self.at += length;
        self.next()
    }

    #[cold]
    fn escaped_string<'b>(&mut self, start: usize, buffer: &'b mut String) -> Result<&'b str> {
        buffer.clear();
        let at = self.at;
        let no_memory = |_| Where { fault: Fault::Memory, at };
        memory::append_text(buffer, &self.text[start..self.at]).map_err(no_memory)?;
        loop {
            match self.next() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(buffer);
                }
                Some(b'\\') => {
                    let character = self.escape()?;
                    memory::append_text(buffer, character.encode_utf8(&mut [0; 4])).map_err(no_memory)?;
                }
                Some(_) => return self.fail(Fault::Control),
                None => return self.fail(Fault::Ends),
            }
            let from = self.at;
            self.run();
            memory::append_text(buffer, &self.text[from..self.at]).map_err(no_memory)?;
        }
    }

    fn escape(&mut self) -> Result<char> {
        let start = self.at;
        self.at += 2;
        Ok(match self.text.as_bytes().get(start + 1) {
            Some(byte @ (b'"' | b'\\' | b'/')) => char::from(*byte),
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let unit = self.hexadecimal(start)?;
                let code = match unit {
                    0xd800..0xdc00 if self.text.as_bytes()[self.at..].starts_with(b"\\u") => {
                        self.at += 2;
                        match self.hexadecimal(start)? {
                            low @ 0xdc00..0xe000 => 0x1_0000 + ((unit - 0xd800) << 10) + (low - 0xdc00),
                            _ => unit,
                        }
                    }
                    _ => unit,
                };
                // Half of a surrogate pair is no character.
                char::from_u32(code).ok_or(Where { fault: Fault::Surrogate, at: start })?
            }
            _ => return Err(Where { fault: Fault::Escape, at: start }),
        })
    }

    fn hexadecimal(&mut self, start: usize) -> Result<u32> {
        let digits = self.text.as_bytes().get(self.at..self.at + 4).unwrap_or_default();
        self.at += 4;
        let value = digits.iter().try_fold(0, |value, byte| Some(value << 4 | char::from(*byte).to_digit(16)?));
        value.filter(|_| digits.len() == 4).ok_or(Where { fault: Fault::Escape, at: start })
    }

    /// A number that counts something: digits, without a sign, a point or an exponent.
    pub(super) fn count(&mut self) -> Result<u64> {
        self.skip_space();
        let start = self.at;
        let mut value = 0_u64;
        while let Some(digit @ b'0'..=b'9') = self.next() {
            let longer = value.checked_mul(10).and_then(|value| value.checked_add(u64::from(digit - b'0')));
            value = longer.ok_or(Where { fault: Fault::LargeNumber, at: start })?;
            self.at += 1;
        }
        let digits = &self.text.as_bytes()[start..self.at];
        let goes_on = matches!(self.next(), Some(b'.' | b'e' | b'E' | b'+' | b'-'));
        if digits.is_empty() || goes_on || (digits[0] == b'0' && digits.len() > 1) {
            return Err(Where { fault: Fault::Number, at: start });
        }
        Ok(value)
    }

    /// Steps over any value.
    pub(super) fn skip_value(&mut self, buffer: &mut String) -> Result<()> {
        let mut open = Vec::new();
        loop {
            self.skip_space();
            let opened = match self.next() {
                Some(b'"') => {
                    self.string(buffer)?;
                    false
                }
                Some(byte @ (b'{' | b'[')) => {
                    if open.len() == DEPTH {
                        return self.fail(Fault::Nested);
                    }
                    self.at += 1;
                    open.push(byte + 2); // the closing bracket of either kind
                    true
                }
                _ => {
                    self.skip_word()?;
                    false
                }
            };
            // Steps to the next value of what is open, closing what ends here.
            let mut first = opened;
            loop {
                let Some(close) = open.last().copied() else { return Ok(()) };
                if self.next_element(first, close)? {
                    break;
                }
                open.pop();
                first = false;
            }
            if open.last() == Some(&b'}') {
                self.string(buffer)?;
                self.expect(b':')?;
            }
        }
    }

    /// Steps over a number, `true`, `false` or `null`.
    fn skip_word(&mut self) -> Result<()> {
        let start = self.at;
        while let Some(b'0'..=b'9' | b'a'..=b'z' | b'E' | b'.' | b'+' | b'-') = self.next() {
            self.at += 1;
        }
        let word = &self.text[start..self.at];
        if matches!(word, "true" | "false" | "null") || is_number(word) {
            return Ok(());
        }
        Err(Where { fault: Fault::Value, at: start })
    }
}

/// Whether a word is a number of JSON that is not too large for a float.
fn is_number(word: &str) -> bool {
    let digits = |text: &str| text.len() - text.trim_start_matches(|character: char| character.is_ascii_digit()).len();
    let mut rest = word.strip_prefix('-').unwrap_or(word);
    let whole = digits(rest);
    if whole == 0 || (rest.starts_with('0') && whole > 1) {
        return false;
    }
    rest = &rest[whole..];
    if let Some(fraction) = rest.strip_prefix('.') {
        let length = digits(fraction);
        if length == 0 {
            return false;
        }
        rest = &fraction[length..];
    }
    if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        if digits(exponent) == 0 {
            return false;
        }
        rest = &exponent[digits(exponent)..];
    }
    rest.is_empty() && word.parse::<f64>().is_ok_and(f64::is_finite)
}
