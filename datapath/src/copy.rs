//! Copies to and from memory that somebody else writes at the same time.
//!
//! The compiler must not assume that such memory holds still, so an ordinary `memcpy` is not
//! allowed to touch it. Private to this crate: [`crate::region::Lease`] checks the ranges.
#![allow(unsafe_code)]

/// Copies `len` bytes, each of them exactly once; which of two concurrent values is seen is open.
///
/// # Safety
/// - `from` is readable and `into` writable for `len` bytes, and the ranges don't overlap.
/// - The side that is not guest memory is borrowed by the caller for the call.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn copy_volatile(from: *const u8, into: *mut u8, len: usize) {
    // SAFETY:
    // - both ranges are valid by the caller's promise.
    // - the direction flag is clear, as the ABI has it; the stack and the flags are not touched.
    // - for the compiler the block is opaque: it may read and write any memory, as a system call.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") into => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies `len` bytes, each of them exactly once; which of two concurrent values is seen is open.
///
/// # Safety
/// - `from` is readable and `into` writable for `len` bytes, and the ranges don't overlap.
/// - The side that is not guest memory is borrowed by the caller for the call.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn copy_volatile(from: *const u8, into: *mut u8, len: usize) {
    const WORD: usize = size_of::<u64>();
    let aligned = from.addr().is_multiple_of(WORD) && into.addr().is_multiple_of(WORD);
    let words = if aligned { len / WORD } else { 0 };
    for index in 0..words {
        // SAFETY: `index * 8 + 8 <= len`, and both pointers are aligned to 8.
        unsafe {
            into.cast::<u64>()
                .add(index)
                .write_volatile(from.cast::<u64>().add(index).read_volatile())
        };
    }
    for index in words * WORD..len {
        // SAFETY: `index < len`.
        unsafe { into.add(index).write_volatile(from.add(index).read_volatile()) };
    }
}

/// Whether `words` words are zero; reads little further than the first that is not.
///
/// # Safety
/// - `from` is readable for `words * 8` bytes, and aligned to 8.
pub(crate) unsafe fn is_zero_volatile(from: *const u64, words: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    if words > 0 && words.is_multiple_of(AVX2_WORDS) && is_x86_feature_detected!("avx2") {
        // SAFETY: readable by the caller's promise; the length and the processor were just checked.
        return unsafe { is_zero_avx2(from, words) };
    }
    // SAFETY: by the caller's promise.
    unsafe { is_zero_portable(from, words) }
}

/// Words that [`is_zero_avx2`] takes at a time: two cache lines.
#[cfg(target_arch = "x86_64")]
const AVX2_WORDS: usize = 16;

/// # Safety
/// - `from` is readable for `words * 8` bytes.
/// - `words` is a multiple of [`AVX2_WORDS`], and not 0.
/// - The processor has AVX2.
#[cfg(target_arch = "x86_64")]
unsafe fn is_zero_avx2(from: *const u64, words: usize) -> bool {
    let zero: u64;
    // SAFETY:
    // - each round reads 128 bytes, and there are `words / 16` rounds.
    // - the upper halves of the registers are zero at the end, so that code without AVX is not
    //   slowed down; the stack is not touched, the flags are, and so it is declared.
    unsafe {
        std::arch::asm!(
            "xor {zero:e}, {zero:e}",
            "2:",
            "vmovdqu ymm0, [{at}]",
            "vmovdqu ymm1, [{at} + 64]",
            "vpor ymm0, ymm0, [{at} + 32]",
            "vpor ymm1, ymm1, [{at} + 96]",
            "vpor ymm0, ymm0, ymm1",
            "vptest ymm0, ymm0",
            "jnz 3f",
            "add {at}, 128",
            "dec {rounds}",
            "jnz 2b",
            "inc {zero}",
            "3:",
            "vzeroupper",
            zero = out(reg) zero,
            at = inout(reg) from => _,
            rounds = inout(reg) words / AVX2_WORDS => _,
            out("xmm0") _,
            out("xmm1") _,
            options(nostack, readonly),
        );
    }
    zero == 1
}

/// # Safety
/// - `from` is readable for `words * 8` bytes, and aligned to 8.
unsafe fn is_zero_portable(from: *const u64, words: usize) -> bool {
    // Four at a time keep the loads apart from the comparison.
    const STEP: usize = 4;
    // SAFETY: `index < words`.
    let word = |index| unsafe { from.add(index).read_volatile() };
    let mut index = 0;
    while index + STEP <= words {
        if word(index) | word(index + 1) | word(index + 2) | word(index + 3) != 0 {
            return false;
        }
        index += STEP;
    }
    (index..words).all(|index| word(index) == 0)
}

/// Writes zeros over `len` bytes.
///
/// # Safety
/// - `into` is writable for `len` bytes.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn clear_volatile(into: *mut u8, len: usize) {
    // SAFETY: as in `copy_volatile`, for the one range.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") into => _,
            in("al") 0u8,
            options(nostack, preserves_flags),
        );
    }
}

/// Writes zeros over `len` bytes.
///
/// # Safety
/// - `into` is writable for `len` bytes.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn clear_volatile(into: *mut u8, len: usize) {
    for index in 0..len {
        // SAFETY: `index < len`.
        unsafe { into.add(index).write_volatile(0) };
    }
}

/// Writes a byte with the value it has, in one instruction that no other write can come between.
/// (An atomic `fetch_or(0)` will not do: compilers turn it into a fence and a load.)
///
/// # Safety
/// - `byte` is readable and writable.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn touch_volatile(byte: *mut u8) {
    // SAFETY:
    // - `byte` is valid by the caller's promise.
    // - the stack is not touched; the flags are, and so it is declared.
    unsafe { std::arch::asm!("lock or byte ptr [{0}], 0", in(reg) byte, options(nostack)) };
}

/// Writes a byte with the value it has, without another write coming in between.
///
/// # Safety
/// - `byte` is readable and writable.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn touch_volatile(byte: *mut u8) {
    use std::sync::atomic::{AtomicU8, Ordering};
    // SAFETY: valid by the caller's promise; every other access is volatile or atomic.
    let byte = unsafe { AtomicU8::from_ptr(byte) };
    let mut seen = byte.load(Ordering::SeqCst);
    while let Err(now) = byte.compare_exchange(seen, seen, Ordering::SeqCst, Ordering::SeqCst) {
        seen = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_a_set_bit_is_seen_by_both() {
        let mut page = vec![0u64; 512];
        let both = |page: &[u64]| {
            // SAFETY: a slice of 512 aligned words.
            let portable = unsafe { is_zero_portable(page.as_ptr(), page.len()) };
            // SAFETY: the same.
            let best = unsafe { is_zero_volatile(page.as_ptr(), page.len()) };
            assert_eq!(portable, best);
            best
        };
        assert!(both(&page));
        for place in 0..512 {
            for bit in [0, 31, 63] {
                page[place] = 1 << bit;
                assert!(!both(&page), "word {place}, bit {bit}");
            }
            page[place] = 0;
        }
        for words in 0..40 {
            // What is behind the end does not count.
            page[words] = 1;
            // SAFETY: fewer words than the slice has.
            assert!(unsafe { is_zero_volatile(page.as_ptr(), words) }, "{words} words");
            page[words] = 0;
        }
    }
}
