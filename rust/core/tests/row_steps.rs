//! Steps by row against a dense model that goes through the list of rows one after the other.
//!
//! The bugs that this hunts: a repeated row that is stepped on twice, or loses one of its gradients; a sum that depends on
//! how many threads there are; a thread that writes the row of another, at the border of two parts; a state that is
//! taken for another; a row that the table does not have, and a row that is to be left alone.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation,
    clippy::needless_for_each,
    reason = "all numbers here are small, and a chain reads as one sentence"
)]

use half::{bf16, f16};
use pdrs_core::Error;
use pdrs_core::row_steps::{Element, Kind, Listing, Real, Rule, Step, sum_repeated};
use proptest::prelude::*;

/// A table and its states.
#[derive(Debug, Clone, PartialEq)]
struct Table<T, R> {
    width: usize,
    values: Vec<T>,
    full: Vec<Vec<R>>,
    single: Vec<Vec<R>>,
}

impl<T: Element> Table<T, T::Real> {
    /// Values that differ, and states as they may be in the midst of training.
    fn of(rule: &Rule, capacity: usize, width: usize) -> Self {
        let number = |at: usize, of: usize| T::Real::of(((at * 37 + of * 11) % 101) as f64 / 50.0 - 1.0);
        let size = capacity * width;
        let full = (1..=rule.full_states()).map(|of| (0..size).map(|at| number(at, of)).collect());
        let mut full: Vec<Vec<T::Real>> = full.collect();
        match rule.kind {
            Kind::Adagrad => square(&mut full[0]),
            Kind::Adam { .. } => full.iter_mut().skip(1).for_each(|state| square(state)),
            // The variance is not negative.
            Kind::RmsProp { centered, .. } => {
                square(&mut full[0]);
                if centered {
                    full[1].iter_mut().for_each(|mean| *mean = T::Real::of(0.01));
                    full[0].iter_mut().for_each(|mean| *mean = *mean + T::Real::of(0.1));
                }
            }
            _ => {}
        }
        let counts = |of: usize| (0..capacity).map(move |row| T::Real::of(((row + of) % 5) as f64));
        let mut single: Vec<Vec<_>> = (0..rule.single_states()).map(|of| counts(of).collect()).collect();
        if let (Some(_), Some(last)) = (rule.log_decay, single.last_mut()) {
            last.iter_mut().for_each(|total| *total = *total * T::Real::of(-0.01));
        }
        Self { width, values: (0..size).map(|at| T::narrow(number(at, 0), None)).collect(), full, single }
    }

    fn step(&mut self, rule: Rule, listing: &Listing, gradients: &[T], threads: usize, seed: Option<u64>) {
        let Self { width, values, full, single } = self;
        let full = full.iter_mut().map(Vec::as_mut_slice).collect();
        let single = single.iter_mut().map(Vec::as_mut_slice).collect();
        let step = Step { rule, values, full, single, width: *width, gradients, seed };
        step.write(listing, threads, |_| {}).unwrap();
    }
}

fn square<R: Real>(numbers: &mut [R]) {
    numbers.iter_mut().for_each(|number| *number = *number * *number);
}

fn listing(rows: &[i64], capacity: usize) -> Listing {
    Listing::of(rows.iter().copied(), capacity, |_| false).unwrap()
}

// -- the model ---------------------------------------------------------------------------------------------------------

/// One element, by the formulas of torch, and not by those under test: `single` are numbers of its row.
fn model_element(rule: &Rule, w: f64, g: f64, full: &mut [f64], single: &[f64], mean_square: f64) -> f64 {
    let Rule { lr, eps, .. } = *rule;
    match rule.kind {
        Kind::Sgd { momentum: 0.0, .. } => w - lr * g,
        Kind::Sgd { momentum, gain, nesterov } => {
            full[0] = momentum * full[0] + gain * g;
            w - lr * if nesterov { g + momentum * full[0] } else { full[0] }
        }
        Kind::Adagrad => {
            full[0] += g.powi(2);
            w - lr * g / (full[0].sqrt() + eps)
        }
        Kind::RowWiseAdagrad => w - lr * g / ((single[0] + mean_square).sqrt() + eps),
        Kind::Adam { beta1, beta2, size, amsgrad } => {
            full[0] = beta1 * full[0] + (1.0 - beta1) * g;
            full[1] = beta2 * full[1] + (1.0 - beta2) * g.powi(2);
            let mut second = full[1];
            if amsgrad {
                full[2] = full[2].max(second);
                second = full[2];
            }
            let (size, scale) = size.unwrap_or_else(|| {
                let count = single[0] + 1.0;
                (lr / (1.0 - beta1.powf(count)), (1.0 - beta2.powf(count)).sqrt())
            });
            w - size * full[0] / (second.sqrt() / scale + eps)
        }
        Kind::RmsProp { alpha, momentum, centered } => {
            full[0] = alpha * full[0] + (1.0 - alpha) * g.powi(2);
            let mut variance = full[0];
            if centered {
                full[1] = alpha * full[1] + (1.0 - alpha) * g;
                variance -= full[1].powi(2);
            }
            let by = g / (variance.sqrt() + eps);
            match full.split_at_mut(usize::from(centered) + 1).1 {
                [] => w - lr * by,
                [buffer, ..] => {
                    *buffer = momentum * *buffer + by;
                    w - lr * *buffer
                }
            }
        }
    }
}

fn model(table: &mut Table<f64, f64>, rule: &Rule, rows: &[i64], gradients: &[f64], skips: impl Fn(usize) -> bool) {
    let width = table.width;
    for row in 0..table.values.len() / width {
        let places: Vec<_> = (0..rows.len()).filter(|place| rows[*place] == row as i64).collect();
        if places.is_empty() || skips(row) {
            continue;
        }
        let sums: Vec<f64> =
            (0..width).map(|at| places.iter().map(|place| gradients[place * width + at]).sum()).collect();
        let single: Vec<f64> = table.single.iter().map(|state| state[row]).collect();
        let shrink = rule.log_decay.map_or(rule.shrink, |total| (total - single[single.len() - 1]).exp());
        let signed = |at: usize| if rule.maximize { -sums[at] } else { sums[at] };
        let gradient = |at: usize, values: &[f64]| signed(at) + rule.decay * values[row * width + at] * shrink;
        let mean_square = (0..width).map(|at| gradient(at, &table.values).powi(2)).sum::<f64>() / width as f64;
        for at in 0..width {
            let g = gradient(at, &table.values);
            let place = row * width + at;
            let mut full: Vec<f64> = table.full.iter().map(|state| state[place]).collect();
            table.values[place] = model_element(rule, table.values[place] * shrink, g, &mut full, &single, mean_square);
            table.full.iter_mut().zip(full).for_each(|(state, number)| state[place] = number);
        }
        match rule.kind {
            Kind::RowWiseAdagrad => table.single[0][row] += mean_square,
            Kind::Adam { size: None, .. } => table.single[0][row] += 1.0,
            _ => {}
        }
        if let (Some(total), Some(last)) = (rule.log_decay, table.single.last_mut()) {
            last[row] = total;
        }
    }
}

fn assert_close(got: &[f64], expected: &[f64]) {
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= 1e-11 * expected.abs().max(1.0), "{got} is not {expected}");
    }
    assert_eq!(got.len(), expected.len());
}

// -- what is tried -----------------------------------------------------------------------------------------------------

fn kinds() -> impl Strategy<Value = Kind> {
    let flag = any::<bool>;
    let momentum = || prop_oneof![Just(0.0), Just(0.9)];
    let size = prop_oneof![Just(None), Just(Some((0.3, 0.7)))];
    prop_oneof![
        (momentum(), prop_oneof![Just(1.0), Just(0.4)], flag()).prop_map(|(momentum, gain, nesterov)| Kind::Sgd {
            momentum,
            gain,
            nesterov
        }),
        Just(Kind::Adagrad),
        Just(Kind::RowWiseAdagrad),
        (size, flag()).prop_map(|(size, amsgrad)| Kind::Adam { beta1: 0.8, beta2: 0.95, size, amsgrad }),
        (momentum(), flag()).prop_map(|(momentum, centered)| Kind::RmsProp { alpha: 0.9, momentum, centered }),
    ]
}

fn rules() -> impl Strategy<Value = Rule> {
    let decay = prop_oneof![Just(0.0), Just(0.1)];
    let shrink = prop_oneof![Just((1.0, None)), Just((0.97, None)), Just((1.0, Some(-0.25)))];
    (kinds(), decay, shrink, any::<bool>()).prop_map(|(kind, decay, (shrink, log_decay), maximize)| Rule {
        kind,
        lr: 0.1,
        eps: 1e-3,
        decay,
        shrink,
        log_decay,
        maximize,
    })
}

/// A capacity, and rows below it, of which many are listed several times.
fn lists(capacity: std::ops::Range<usize>, longest: usize) -> impl Strategy<Value = (usize, Vec<i64>)> {
    capacity.prop_flat_map(move |capacity| (Just(capacity), prop::collection::vec(0..capacity as i64, 0..longest)))
}

fn gradients(count: usize) -> Vec<f64> {
    (0..count).map(|at| ((at * 53 + 7) % 211) as f64 / 70.0 - 1.5).collect()
}

proptest! {
    #[test]
    fn a_step_is_that_of_the_dense_model(
        rule in rules(), (capacity, rows) in lists(1..40, 60), width in 1_usize..5, frozen in any::<u64>(),
    ) {
        let skips = |row: usize| frozen >> row & 3 == 3;
        let gradients = gradients(rows.len() * width);
        let mut table = Table::<f64, f64>::of(&rule, capacity, width);
        let mut expected = table.clone();
        let listing = Listing::of(rows.iter().copied(), capacity, skips).unwrap();
        for _ in 0..2 {
            table.step(rule, &listing, &gradients, 3, None);
            model(&mut expected, &rule, &rows, &gradients, skips);
        }
        assert_close(&table.values, &expected.values);
        table.full.iter().zip(&expected.full).for_each(|(got, expected)| assert_close(got, expected));
        table.single.iter().zip(&expected.single).for_each(|(got, expected)| assert_close(got, expected));
    }

    /// The gradients are such that another order of the same row gives another sum.
    #[test]
    fn gradients_of_a_row_are_added_up_in_the_order_of_the_list(
        (capacity, rows) in lists(1..9, 700), is_wide in any::<bool>(),
    ) {
        // Far apart, so that all digits of a row number are sorted by.
        let apart = if is_wide { (u32::MAX as usize - 1) / capacity } else { 1 };
        let rows: Vec<i64> = rows.iter().map(|row| row * apart as i64).collect();
        let numbers: Vec<f32> = (0..rows.len()).map(|at| 10_f32.powi((at * 7 % 13) as i32 - 6) * 1.7).collect();
        let listing = listing(&rows, capacity * apart);
        let is_repeated = (1..rows.len()).any(|at| rows[..at].contains(&rows[at]));
        prop_assert_eq!((listing.len(), listing.is_empty()), (rows.len(), rows.is_empty()));
        prop_assert_eq!(listing.repeats(), is_repeated);
        let mut got = numbers.clone();
        sum_repeated(&listing, &mut got, 1).unwrap();
        for (place, row) in rows.iter().enumerate() {
            let expected = if rows[..place].contains(row) {
                0.0
            } else {
                (0..rows.len()).filter(|at| rows[*at] == *row).fold(0_f32, |sum, at| sum + numbers[at])
            };
            prop_assert_eq!(got[place].to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn a_row_that_the_table_does_not_have_is_an_error(
        (capacity, rows) in lists(1..40, 60), place in any::<prop::sample::Index>(),
        wrong in prop_oneof![Just(i64::MIN), Just(-1), Just(0), Just(1), Just(1 << 32), Just(i64::MAX)],
    ) {
        let mut rows = rows;
        let wrong = if wrong == 0 || wrong == 1 { capacity as i64 + wrong } else { wrong };
        rows.insert(place.index(rows.len() + 1), wrong);
        // Though it would be left alone if it were there.
        let found = Listing::of(rows.iter().copied(), capacity, |_| true);
        prop_assert_eq!(found.map(|_| ()), Err(Error::Row { row: wrong, capacity: capacity as u64 }));
    }
}

/// Enough numbers for several threads, of which one row may have most.
fn large_lists() -> impl Strategy<Value = (usize, Vec<i64>)> {
    (2_usize..3000, 0_u64..4, any::<u64>()).prop_map(|(capacity, shape, seed)| {
        let mut state = seed | 1;
        let rows = (0..9000).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let row = (state >> 33) % capacity as u64;
            // All kinds of borders: far apart, in one row, in the first and the last.
            let row = match shape {
                0 => row,
                1 => {
                    if row.is_multiple_of(8) {
                        row
                    } else {
                        capacity as u64 / 2
                    }
                }
                2 => row % 2 * (capacity as u64 - 1),
                _ => capacity as u64 - 1,
            };
            row.cast_signed()
        });
        (capacity, rows.collect())
    })
}

fn all_threads_write_the_same<T: Element>(
    rule: Rule,
    capacity: usize,
    rows: &[i64],
    seed: Option<u64>,
) -> Result<(), TestCaseError> {
    const WIDTH: usize = 160; // 9000 rows of it are work for two threads, and with states for up to eight
    let gradients: Vec<T> =
        gradients(rows.len() * WIDTH).iter().map(|g| T::narrow(T::Real::of(*g * 0.3), None)).collect();
    let listing = listing(rows, capacity);
    let begun = Table::<T, T::Real>::of(&rule, capacity, WIDTH);
    let mut expected = begun.clone();
    expected.step(rule, &listing, &gradients, 1, seed);
    let bits = |table: &Table<T, T::Real>| {
        let mut found = vec![bytemuck::cast_slice::<T, u8>(&table.values).to_vec()];
        found.extend(table.full.iter().chain(&table.single).map(|one| bytemuck::cast_slice(one).to_vec()));
        found
    };
    for threads in [2, 3, 8] {
        let mut table = begun.clone();
        table.step(rule, &listing, &gradients, threads, seed);
        prop_assert!(bits(&table) == bits(&expected), "{} threads", threads);
    }
    prop_assert!(bits(&begun) != bits(&expected));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn any_number_of_threads_writes_the_same_bits(rule in rules(), (capacity, rows) in large_lists(), seed in any::<u64>()) {
        all_threads_write_the_same::<f32>(rule, capacity, &rows, None)?;
        all_threads_write_the_same::<f64>(rule, capacity, &rows, None)?;
        all_threads_write_the_same::<f16>(rule, capacity, &rows, None)?;
        all_threads_write_the_same::<bf16>(rule, capacity, &rows, Some(seed))?;
    }
}

fn sgd(lr: f64) -> Rule {
    let kind = Kind::Sgd { momentum: 0.0, gain: 1.0, nesterov: false };
    Rule { kind, lr, eps: 0.0, decay: 0.0, shrink: 1.0, log_decay: None, maximize: false }
}

#[test]
fn rounding_at_random_is_right_on_average_and_keeps_what_fits() {
    let count = 1 << 16;
    for value in [1.0_f32, -1.0] {
        // A quarter of the way to the neighbour, and to that beyond zero.
        let bits = value.to_bits() + (1 << 14);
        let wanted = f32::from_bits(bits);
        let table = vec![bf16::ZERO; count];
        let mut table = Table { width: 1, values: table, full: vec![], single: vec![] };
        // The gradient fits; the rate makes the rest.
        let gradients = vec![bf16::from_f32(-value); count];
        let rows: Vec<i64> = (0..count as i64).collect();
        table.step(
            sgd(f64::from(wanted) / f64::from(bf16::from_f32(value).to_f32())),
            &listing(&rows, count),
            &gradients,
            1,
            Some(1),
        );
        let up = table.values.iter().filter(|one| one.to_bits() != bf16::from_f32(value).to_bits()).count();
        let share = up as f64 / count as f64;
        assert!((share - 0.25).abs() < 0.01, "{value}: {share}");
    }
    let mut fits = Table { width: 1, values: vec![bf16::ZERO; 3], full: vec![], single: vec![] };
    let gradients = [bf16::NEG_INFINITY, bf16::from_f32(-0.5), bf16::NAN];
    fits.step(sgd(1.0), &listing(&[0, 1, 2], 3), &gradients, 1, Some(2));
    assert_eq!(fits.values[..2], [bf16::INFINITY, bf16::from_f32(0.5)]);
    assert!(fits.values[2].is_nan());
}

#[test]
fn a_step_without_rows_writes_nothing() {
    let mut table = Table::<f32, f32>::of(&sgd(1.0), 3, 2);
    let begun = table.clone();
    table.step(sgd(1.0), &listing(&[], 3), &[], 4, None);
    table.step(sgd(1.0), &Listing::default(), &[], 4, None);
    assert_eq!(table, begun);
    let mut empty = Table::<f32, f32>::of(&sgd(1.0), 3, 0);
    empty.step(sgd(1.0), &listing(&[2, 2, 0], 3), &[], 4, None);
    assert!(empty.values.is_empty());
}

/// The sum of the logarithms is kept in 32 bits, too, and grows for as long as there is training.
#[test]
fn decay_that_is_made_up_for_does_not_drift_in_32_bits() {
    let mut table = Table { width: 1, values: vec![1.0_f32], full: vec![], single: vec![vec![0.0_f32]] };
    let (steps, each) = (100_000, -1e-5_f64);
    let listing = listing(&[0], 1);
    // What it loses is put back: only the error is left.
    let mut exact = 1.0_f64;
    for step in 1..=steps {
        let rule = Rule { log_decay: Some(-8.0 + each * f64::from(step)), ..sgd(0.0) };
        if step == 1 {
            table.single[0][0] = -8.0;
        }
        table.step(rule, &listing, &[0.0], 1, None);
        exact *= each.exp();
    }
    let error = (f64::from(table.values[0]) / exact - 1.0).abs();
    assert!(error < 1e-4, "{error}");
}
