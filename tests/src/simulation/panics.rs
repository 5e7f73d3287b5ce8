//! Panics inside a simulated fleet, kept for the account: a panic anywhere is a broken promise.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static SIMULATES: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

/// From now on panics of this thread are kept instead of printed.
pub(super) fn begin() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let kept = SIMULATES.with_borrow_mut(|kept| {
                let simulates = kept.is_some();
                if let Some(kept) = kept {
                    kept.get_or_insert_with(|| info.to_string().replace('\n', " "));
                }
                simulates
            });
            if !kept {
                usual(info);
            }
        }));
    });
    SIMULATES.set(Some(None));
}

/// The first panic since [`begin`], if there was one.
pub(super) fn take() -> Option<String> {
    SIMULATES.with_borrow_mut(|kept| kept.as_mut()?.take())
}

/// From now on panics of this thread are printed again.
pub(super) fn end() -> Option<String> {
    SIMULATES.take().flatten()
}
