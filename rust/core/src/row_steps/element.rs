//! The numbers of a table, and those that a step computes with.
//!
//! Rows of 16 bits, and their states, are computed with in 32 bits. With 8 bits of precision a moment that moves by a
//! thousandth of itself would not move at all.

use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

/// A number that is computed with: `f32` or `f64`.
pub trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + bytemuck::Pod
{
    /// The number 0.
    const ZERO: Self;
    /// The nearest number.
    fn of(number: f64) -> Self;
    /// The same number.
    fn wide(self) -> f64;
    /// The square root.
    #[must_use]
    fn root(self) -> Self;
}

/// A number as it lies in a table.
pub trait Element: Copy + Send + Sync + bytemuck::Pod {
    /// What it is computed with.
    type Real: Real;
    /// The same number.
    fn widen(self) -> Self::Real;
    /// The nearest number; of two neighbours one at random, where there is noise.
    fn narrow(number: Self::Real, noise: Option<u16>) -> Self;
}

macro_rules! real {
    ($name:ty) => {
        impl Real for $name {
            const ZERO: Self = 0.0;
            #[inline]
            #[allow(clippy::cast_possible_truncation, clippy::cast_lossless, reason = "one macro for both widths")]
            fn of(number: f64) -> Self {
                number as Self
            }
            #[inline]
            #[allow(clippy::cast_lossless, reason = "one macro for both widths")]
            fn wide(self) -> f64 {
                self as f64
            }
            #[inline]
            fn root(self) -> Self {
                self.sqrt()
            }
        }

        impl Element for $name {
            type Real = Self;
            #[inline]
            fn widen(self) -> Self {
                self
            }
            #[inline]
            fn narrow(number: Self, _noise: Option<u16>) -> Self {
                number
            }
        }
    };
}

real!(f32);
real!(f64);

impl Element for bf16 {
    type Real = f32;
    #[inline]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    /// With noise, the bits that are cut off are the probability of the larger neighbour.
    #[inline]
    fn narrow(number: f32, noise: Option<u16>) -> Self {
        match noise {
            Some(noise) if number.is_finite() => {
                Self::from_bits((number.to_bits().wrapping_add(u32::from(noise)) >> 16) as u16)
            }
            _ => Self::from_f32(number),
        }
    }
}

impl Element for f16 {
    type Real = f32;
    #[inline]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline]
    fn narrow(number: f32, _noise: Option<u16>) -> Self {
        Self::from_f32(number)
    }
}

/// 16 random bits for an element of a table, which depend on nothing but the seed and its place.
#[inline]
pub(super) fn noise(seed: u64, place: usize) -> u16 {
    // The finaliser of SplitMix64.
    let mut bits = seed.wrapping_add((place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 48) as u16
}
