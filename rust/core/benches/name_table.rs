//! What an operation costs, from 10^3 to 10^7 names: it must not grow but for cache misses.
//!
//! `cargo bench -p pdrs-core`; a part of it with `cargo bench -p pdrs-core -- pop/1000000`.
#![allow(missing_docs, reason = "criterion's macros write the functions")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pdrs_core::Place;
use pdrs_core::names::table::NameTable;

/// Names of 16 characters.
fn names(size: usize) -> Vec<String> {
    (0..size).map(|n| format!("{n:016x}")).collect()
}

/// The same names in a random order: a walk with a step that has no common divisor with the size.
fn shuffled(names: &[String]) -> Vec<String> {
    let size = names.len();
    let step = size * 618 / 1000;
    let step = (step..size).find(|step| gcd(*step, size) == 1).expect("there are primes");
    (0..size).map(|n| names[n * step % size].clone()).collect()
}

fn gcd(one: usize, other: usize) -> usize {
    if other == 0 { one } else { gcd(other, one % other) }
}

fn place(row: u64) -> Place {
    Place::of_id(row).expect("a row is small")
}

fn filled(names: &[String]) -> NameTable {
    let made = NameTable::of_distinct(names.iter().zip((0..).map(place)));
    made.expect("they fit").ok().expect("they are distinct")
}

/// Times `each` over all names in a random order, in maps that are made anew whenever they are used up.
fn bench<R>(criterion: &mut Criterion, name: &str, mut each: impl FnMut(&mut NameTable, &String) -> R) {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    for exponent in 3..=7 {
        let size = 10_usize.pow(exponent);
        let in_order = names(size);
        let queries = shuffled(&in_order);
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                let mut left = usize::try_from(rounds).expect("64 bits");
                while left > 0 {
                    let mut map = filled(&in_order);
                    let now = queries.len().min(left);
                    let start = Instant::now();
                    for query in &queries[..now] {
                        black_box(each(&mut map, query));
                    }
                    spent += start.elapsed();
                    left -= now;
                }
                spent
            });
        });
    }
    group.finish();
}

fn operations(criterion: &mut Criterion) {
    bench(criterion, "get", |table, name| table.get(name));
    bench(criterion, "replace", |table, name| table.set(name, |_| place(1)));
    bench(criterion, "pop", NameTable::remove);
    bench(criterion, "popitem_last", |table, _| table.remove_end(true));
    bench(criterion, "popitem_first", |table, _| table.remove_end(false));
    bench(criterion, "move_to_last", |table, name| table.move_to_end(name, true));
    bench(criterion, "move_to_first", |table, name| table.move_to_end(name, false));
}

criterion_group!(benches, operations);
criterion_main!(benches);
