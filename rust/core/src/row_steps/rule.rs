//! What an optimizer does to one row that has a gradient, and to its state.
//!
//! The formulas are those of torch; `docs/training.md` has them, and their sources.

use crate::row_steps::element::Real;

/// An optimizer's formula, and its numbers for this step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// The formula.
    pub kind: Kind,
    /// The learning rate.
    pub lr: f64,
    /// Is added to a root before it divides.
    pub eps: f64,
    /// So much of the value is added to the gradient.
    pub decay: f64,
    /// The value is multiplied by this first.
    pub shrink: f64,
    /// The sum of the logarithms of all `shrink` up to this step, where rows are to make up for those that they missed.
    pub log_decay: Option<f64>,
    /// Whether the value follows the gradient, and not its opposite.
    pub maximize: bool,
}

/// A formula.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Stochastic gradient descent; with momentum it has a state.
    Sgd {
        /// How much of the momentum is kept.
        momentum: f64,
        /// How much of the gradient is added to it.
        gain: f64,
        /// Whether the step looks ahead.
        nesterov: bool,
    },
    /// The sum of squares, by element.
    Adagrad,
    /// The sum of the means of squares, one number for each row.
    RowWiseAdagrad,
    /// Two moments, and with `amsgrad` the largest of the second.
    Adam {
        /// How much of the first moment is kept.
        beta1: f64,
        /// How much of the second moment is kept.
        beta2: f64,
        /// The learning rate with the bias of the moments corrected, and what divides the root; none if each row counts
        /// its own steps.
        size: Option<(f64, f64)>,
        /// Whether the largest second moment divides.
        amsgrad: bool,
    },
    /// The mean of squares, less the square of the mean if `centered`, and with momentum what moves the value.
    RmsProp {
        /// How much of the mean is kept.
        alpha: f64,
        /// How much of the momentum is kept.
        momentum: f64,
        /// Whether the mean of the gradient is kept, too.
        centered: bool,
    },
}

impl Rule {
    /// How many states have the shape of the table.
    #[must_use]
    pub fn full_states(&self) -> usize {
        match self.kind {
            Kind::Sgd { momentum, .. } => usize::from(momentum != 0.0),
            Kind::Adagrad => 1,
            Kind::RowWiseAdagrad => 0,
            Kind::Adam { amsgrad, .. } => 2 + usize::from(amsgrad),
            Kind::RmsProp { momentum, centered, .. } => 1 + usize::from(centered) + usize::from(momentum != 0.0),
        }
    }

    /// How many states have one number for each row.
    #[must_use]
    pub fn single_states(&self) -> usize {
        let own = matches!(self.kind, Kind::RowWiseAdagrad | Kind::Adam { size: None, .. });
        usize::from(own) + usize::from(self.log_decay.is_some())
    }

    /// Changes the values of a row, and its states, by its gradient, which may be overwritten.
    #[inline]
    pub(super) fn apply<R: Real>(
        &self,
        values: &mut [R],
        full: [&mut [R]; 3],
        single: [Option<&mut R>; 2],
        gradient: &mut [R],
    ) {
        if self.maximize {
            for g in gradient.iter_mut() {
                *g = R::ZERO - *g;
            }
        }
        let [mut own, mut log_decay] = single;
        if self.log_decay.is_some() && log_decay.is_none() {
            (own, log_decay) = (None, own);
        }
        self.shrink(values, log_decay);
        if self.decay != 0.0 {
            let decay = R::of(self.decay);
            gradient.iter_mut().zip(&*values).for_each(|(g, w)| *g = *g + decay * *w);
        }
        let (lr, eps) = (R::of(self.lr), R::of(self.eps));
        let [first, second, third] = full;
        match self.kind {
            Kind::Sgd { momentum, gain, nesterov } => {
                if momentum == 0.0 {
                    return values.iter_mut().zip(&*gradient).for_each(|(w, g)| *w = *w - lr * *g);
                }
                let (momentum, gain) = (R::of(momentum), R::of(gain));
                for ((w, g), m) in values.iter_mut().zip(&*gradient).zip(first) {
                    *m = momentum * *m + gain * *g;
                    *w = *w - lr * (if nesterov { *g + momentum * *m } else { *m });
                }
            }
            Kind::Adagrad => {
                for ((w, g), sum) in values.iter_mut().zip(&*gradient).zip(first) {
                    *sum = *sum + *g * *g;
                    *w = *w - lr * (*g / (sum.root() + eps));
                }
            }
            Kind::RowWiseAdagrad => {
                let Some(sum) = own else { return };
                let squares = gradient.iter().fold(R::ZERO, |total, g| total + *g * *g);
                *sum = *sum + squares / R::of(f64::from(gradient.len().max(1) as u32));
                let rate = lr / (sum.root() + eps);
                values.iter_mut().zip(&*gradient).for_each(|(w, g)| *w = *w - rate * *g);
            }
            Kind::Adam { beta1, beta2, size, amsgrad } => {
                let (size, scale) = size.unwrap_or_else(|| {
                    let Some(count) = own else { return (self.lr, 1.0) };
                    *count = *count + R::of(1.0);
                    let count = count.wide();
                    (self.lr / (1.0 - beta1.powf(count)), (1.0 - beta2.powf(count)).sqrt())
                });
                let (size, scale) = (R::of(size), R::of(scale));
                let (beta1, beta2) = (R::of(1.0 - beta1), R::of(1.0 - beta2));
                let moments = first.iter_mut().zip(second);
                if !amsgrad {
                    for ((w, g), (m, v)) in values.iter_mut().zip(&*gradient).zip(moments) {
                        *m = *m + (*g - *m) * beta1;
                        *v = *v + (*g * *g - *v) * beta2;
                        *w = *w - size * (*m / (v.root() / scale + eps));
                    }
                    return;
                }
                for (((w, g), (m, v)), most) in values.iter_mut().zip(&*gradient).zip(moments).zip(third) {
                    *m = *m + (*g - *m) * beta1;
                    *v = *v + (*g * *g - *v) * beta2;
                    // As torch's maximum, which keeps what is no number.
                    if *most >= *v {
                    } else {
                        *most = *v;
                    }
                    *w = *w - size * (*m / (most.root() / scale + eps));
                }
            }
            Kind::RmsProp { alpha, momentum, centered } => {
                let (kept, gain, momentum_kept) = (R::of(alpha), R::of(1.0 - alpha), R::of(momentum));
                let (average, buffer) = if centered { (second, third) } else { (third, second) };
                for (at, (w, g)) in values.iter_mut().zip(&*gradient).enumerate() {
                    let square = &mut first[at];
                    *square = kept * *square + gain * *g * *g;
                    let mut variance = *square;
                    if centered {
                        average[at] = average[at] + (*g - average[at]) * gain;
                        variance = variance - average[at] * average[at];
                    }
                    let mut by = *g / (variance.root() + eps);
                    if momentum != 0.0 {
                        buffer[at] = momentum_kept * buffer[at] + by;
                        by = buffer[at];
                    }
                    *w = *w - lr * by;
                }
            }
        }
    }

    /// Multiplies values by what they shrink by in this step, and in all that they missed.
    #[inline]
    fn shrink<R: Real>(&self, values: &mut [R], log_decay: Option<&mut R>) {
        let by = match (self.log_decay, log_decay) {
            (Some(total), Some(last)) => {
                let by = (total - last.wide()).exp();
                *last = R::of(total);
                by
            }
            _ => self.shrink,
        };
        let by = R::of(by);
        if by < R::of(1.0) || by > R::of(1.0) {
            for w in values {
                *w = *w * by;
            }
        }
    }
}
