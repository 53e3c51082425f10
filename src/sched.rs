//! Points at which another core could run between two accesses to what cores share. In a simulation somebody
//! else may get a turn there; elsewhere they are nothing.

#[cfg(any(test, feature = "sim"))]
use std::{cell::RefCell, rc::Rc};

#[cfg(any(test, feature = "sim"))]
type Hook = Rc<dyn Fn()>;

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Such a point.
#[inline]
pub(crate) fn point() {
    #[cfg(any(test, feature = "sim"))]
    {
        let hook = HOOK.with_borrow(Clone::clone);
        if let Some(hook) = hook {
            hook();
        }
    }
}

/// Runs `f` on this thread with `hook` called at every point; `None`: with nothing.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn with_hook<R>(hook: Option<Hook>, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Hook>);
    impl Drop for Restore {
        fn drop(&mut self) {
            HOOK.set(self.0.take());
        }
    }
    let _restore = Restore(HOOK.replace(hook));
    f()
}
