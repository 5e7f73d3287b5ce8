//! Parts of a network whose intermediate results are not kept for the backward pass, but computed again there.
//!
//! A network of which every part is recomputed keeps the parts' inputs and the intermediate results of one part. The
//! arithmetic is the same, in the same order, so gradients have the same bits. tch has no such thing; recompute.cpp
//! puts a node of ours into libtorch's graph, which calls back here.

use std::any::Any;
use std::ffi::{CStr, c_char, c_void};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tch::Tensor;
use torch_sys::C_tensor;

/// Room for what libtorch or a panic says.
const ERROR_BYTES: usize = 1024;

/// A part of a network: modules with their tensors.
#[derive(Debug)]
pub(super) struct Part<T>(Arc<T>);

impl<T> Deref for Part<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Send + 'static> Part<T> {
    pub(super) fn new(modules: T) -> Self {
        Self(Arc::new(modules))
    }

    /// `forward(modules, inputs)`, of which the graph of gradients keeps the inputs alone.
    ///
    /// Gradients flow to the inputs that ask for one and to every leaf that `forward` uses. An input that is used outside
    /// too, and at two places inside, has its gradients summed in another order than without recomputation.
    ///
    /// # Panics
    /// When `forward` does, now or in the backward pass, or uses a tensor that is neither an input nor a leaf.
    pub(super) fn recomputed(
        &self,
        inputs: &[&Tensor],
        forward: fn(&T, &[Tensor]) -> Tensor,
    ) -> Tensor {
        let call = Box::new(Call {
            modules: Arc::clone(&self.0),
            forward,
        });
        let pointers: Vec<*const C_tensor> = inputs.iter().map(|x| x.as_ptr()).collect();
        let mut error: [c_char; ERROR_BYTES] = [0; ERROR_BYTES];
        // SAFETY: the pointers are of tensors that live until the call returns. `call` is a `Call<T>`, which `run::<T>`
        // and `release::<T>` take it for, and which the other side releases once. What comes back is null or a new
        // tensor of ours. `error` has the capacity that is told.
        let output = unsafe {
            distillery_recompute(
                pointers.as_ptr(),
                pointers.len(),
                Box::into_raw(call).cast(),
                run::<T>,
                release::<T>,
                error.as_mut_ptr(),
                ERROR_BYTES,
            )
        };
        if output.is_null() {
            // SAFETY: the other side ends what it writes with a zero, and the array began as zeros.
            let words = unsafe { CStr::from_ptr(error.as_ptr()) };
            panic!("{}", words.to_string_lossy());
        }
        // SAFETY: it is not null, so it is a tensor that was made for us.
        unsafe { Tensor::from_ptr(output) }
    }
}

/// What a node of the graph holds: a part and how it is computed.
///
/// libtorch may call and drop it on the backward pass's thread for a device. `modules` then is used on two threads in
/// turn, never at once: whoever called for the backward pass waits for it. Their tensors count references atomically.
struct Call<T> {
    modules: Arc<T>,
    forward: fn(&T, &[Tensor]) -> Tensor,
}

/// Takes `count` tensors over and gives the part's output, or null after writing why into `error`.
unsafe extern "C" fn run<T>(
    call: *const c_void,
    inputs: *const *mut C_tensor,
    count: usize,
    error: *mut c_char,
    capacity: usize,
) -> *mut C_tensor {
    // SAFETY: `call` is the `Call<T>` that `recomputed::<T>` gave away and that has not been released.
    let call = unsafe { &*call.cast::<Call<T>>() };
    let take = |i| {
        // SAFETY: the caller gives `count` tensors of its own and uses them no more.
        unsafe { Tensor::from_ptr(*inputs.add(i)) }
    };
    let inputs: Vec<Tensor> = (0..count).map(take).collect();
    match catch_unwind(AssertUnwindSafe(|| (call.forward)(&call.modules, &inputs))) {
        Ok(mut output) => {
            let pointer = output.as_mut_ptr();
            // The caller owns it now.
            std::mem::forget(output);
            pointer
        }
        Err(panic) => {
            let words = words_of(panic.as_ref());
            let words = &words.as_bytes()[..words.len().min(capacity.saturating_sub(1))];
            // SAFETY: `error` has room for `capacity` characters, all zero, of which the last stays so.
            unsafe { std::ptr::copy_nonoverlapping(words.as_ptr().cast(), error, words.len()) };
            std::ptr::null_mut()
        }
    }
}

/// Drops a part that no graph needs any more.
unsafe extern "C" fn release<T>(call: *const c_void) {
    // SAFETY: it is the box that `recomputed::<T>` gave away, and the other side calls this once.
    drop(unsafe { Box::from_raw(call.cast_mut().cast::<Call<T>>()) });
}

fn words_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words")
}

type Forward = unsafe extern "C" fn(
    *const c_void,
    *const *mut C_tensor,
    usize,
    *mut c_char,
    usize,
) -> *mut C_tensor;

unsafe extern "C" {
    /// recompute.cpp.
    fn distillery_recompute(
        inputs: *const *const C_tensor,
        count: usize,
        part: *const c_void,
        forward: Forward,
        release: unsafe extern "C" fn(*const c_void),
        error: *mut c_char,
        capacity: usize,
    ) -> *mut C_tensor;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::*;

    /// `tanh(x w) + tanh(y)`, counting how often it is computed and whether it is alive.
    struct Modules {
        w: Tensor,
        runs: Arc<AtomicUsize>,
    }

    impl Modules {
        fn forward(&self, inputs: &[Tensor]) -> Tensor {
            self.runs.fetch_add(1, Ordering::Relaxed);
            inputs[0].matmul(&self.w).tanh() + inputs[1].tanh()
        }
    }

    fn ramp(from: f64) -> Tensor {
        let values = Tensor::arange_start(0, 9, (Kind::Float, Device::Cpu)) * 0.1 + from;
        values.view([3, 3])
    }

    fn leaf(from: f64) -> Tensor {
        ramp(from).set_requires_grad(true)
    }

    fn part(w: &Tensor) -> (Part<Modules>, Arc<AtomicUsize>) {
        let runs = Arc::new(AtomicUsize::new(0));
        let modules = Modules {
            w: w.shallow_clone(),
            runs: Arc::clone(&runs),
        };
        (Part::new(modules), runs)
    }

    #[test]
    fn gradients_have_the_bits_of_a_graph_that_is_kept() {
        let (w, x, y) = (leaf(-0.5), leaf(0.2), leaf(-0.1));
        let gradients = |recompute: bool| {
            let (part, runs) = part(&w);
            // One part after the other, around an operation whose result only the graph holds.
            let step = |x: &Tensor| match recompute {
                true => part.recomputed(&[x, &y], Modules::forward),
                false => part.forward(&[x.shallow_clone(), y.shallow_clone()]),
            };
            let out = step(&(step(&x).sin() * 0.7));
            let loss = out.square().sum(Kind::Float);
            let gradients = Tensor::run_backward(&[&loss], &[&w, &x, &y], false, false);
            assert_eq!(runs.load(Ordering::Relaxed), if recompute { 4 } else { 2 });
            gradients.into_iter().chain([out]).collect::<Vec<_>>()
        };
        for (again, kept) in std::iter::zip(gradients(true), gradients(false)) {
            assert!(again.equal(&kept), "{again} {kept}");
        }
    }

    #[test]
    fn only_what_is_asked_for_gets_a_gradient() {
        let (w, x, y) = (leaf(-0.5), ramp(0.2), leaf(-0.1));
        let (part, _) = part(&w);
        let loss = part.recomputed(&[&x, &y], Modules::forward);
        let loss = loss.sum(Kind::Float);
        let gradients = Tensor::run_backward(&[&loss], &[&w], false, false);
        let slope: Tensor = x.matmul(&w).tanh().square() * -1.0 + 1.0;
        let wanted = x.transpose(0, 1).matmul(&slope.detach());
        assert!((&gradients[0] - wanted).abs().max().double_value(&[]) < 1e-6);
        assert!(!y.grad().defined());
    }

    #[test]
    fn without_gradients_nothing_is_kept() {
        let (w, x) = (leaf(-0.5), leaf(0.2));
        let (part, runs) = part(&w);
        let out = tch::no_grad(|| part.recomputed(&[&x, &x], Modules::forward));
        assert!(!out.requires_grad());
        let held = Arc::downgrade(&part.0);
        drop(part);
        assert!(held.upgrade().is_none(), "no graph holds the modules");
        assert_eq!(runs.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_graph_holds_the_modules_until_it_is_gone() {
        let (w, x) = (leaf(-0.5), leaf(0.2));
        let (part, _) = part(&w);
        let out = part.recomputed(&[&x, &x], Modules::forward);
        let held = Arc::downgrade(&part.0);
        drop(part);
        assert!(held.upgrade().is_some());
        drop(out);
        assert!(held.upgrade().is_none());
    }

    fn words_of_panic(work: impl FnOnce()) -> String {
        let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("it panics");
        words_of(panic.as_ref()).to_owned()
    }

    #[test]
    fn a_panic_in_a_part_comes_out_as_one() {
        let (w, x) = (leaf(-0.5), leaf(0.2));
        let (part, _) = part(&w);
        let words = words_of_panic(|| {
            drop(part.recomputed(&[&x, &x], |_, _| panic!("no such thing")));
        });
        assert!(words.contains("no such thing"), "{words}");
        let second = |modules: &Modules, inputs: &[Tensor]| {
            let out = modules.forward(inputs);
            assert!(modules.runs.load(Ordering::Relaxed) < 2, "the second time");
            out
        };
        let loss = part.recomputed(&[&x, &x], second).sum(Kind::Float);
        let words = words_of_panic(|| {
            Tensor::run_backward(&[&loss], &[&w], false, false);
        });
        assert!(words.contains("the second time"), "{words}");
    }

    #[test]
    fn a_part_that_holds_a_tensor_of_the_graph_is_refused() {
        let w = leaf(-0.5) * 2.0;
        let (part, _) = part(&w);
        let x = leaf(0.2);
        let words = words_of_panic(|| {
            drop(part.recomputed(&[&x, &x], Modules::forward));
        });
        assert!(words.contains("more than its inputs"), "{words}");
    }
}
