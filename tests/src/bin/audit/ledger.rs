//! I12: which rows each step must have consumed, worked out anew from the recipe's seed.
//!
//! Order: Philox4x32-10 keyed by the seed, counter (0, purpose 3 above draw 0, stage low, stage high), gives the key of
//! a stage; each pass over the rows is a Feistel permutation with a key mixed from that and the pass. Ledger: for each
//! row the sixteen hexadecimal digits of a mixed form of its number, added up place by place.

/// Numbers in a ledger.
const PLACES: usize = 16;

/// The order in which a stage reads the rows of its dataset.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order {
    key: u64,
    rows: u64,
    batch: u64,
}

impl Order {
    /// Of the training stage at `stage` in the recipe.
    pub(crate) fn new(seed: u64, stage: u64, rows: u64, batch: u64) -> Self {
        const TRAINING_ORDER: u32 = 3;
        let counter = [0, TRAINING_ORDER << 16, stage as u32, (stage >> 32) as u32];
        let words = philox(counter, [seed as u32, (seed >> 32) as u32]);
        Self {
            key: u64::from(words[1]) << 32 | u64::from(words[0]),
            rows,
            batch,
        }
    }

    /// The ledger that step `step`, counted from 1, must show.
    pub(crate) fn ledger(&self, step: u64) -> [u64; PLACES] {
        let mut sums = [0; PLACES];
        for position in (step - 1) * self.batch..step * self.batch {
            let digits = scramble(self.row(position));
            for (place, sum) in sums.iter_mut().enumerate() {
                *sum += digits >> (4 * place) & 0xF;
            }
        }
        sums
    }

    fn row(&self, position: u64) -> u64 {
        let (pass, within) = (position / self.rows, position % self.rows);
        let key = scramble(scramble(self.key).wrapping_add(pass));
        // The smallest even number of bits, at least two, that holds every row.
        let bits = (64 - (self.rows - 1).leading_zeros())
            .max(2)
            .next_multiple_of(2);
        let mut row = within;
        loop {
            row = shuffle(row, key, bits / 2);
            if row < self.rows {
                return row;
            }
        }
    }
}

/// Eight rounds over two halves of `half` bits.
fn shuffle(value: u64, key: u64, half: u32) -> u64 {
    let mask = (1 << half) - 1;
    let (mut high, mut low) = (value >> half, value & mask);
    for round in 0..8 {
        let noise = scramble(scramble(key ^ round).wrapping_add(low));
        (high, low) = (low, high ^ noise & mask);
    }
    high << half | low
}

/// SplitMix64: one step of its counter, then its output function.
fn scramble(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let product = |a: u32, b: u32| {
        let wide = u64::from(a) * u64::from(b);
        ((wide >> 32) as u32, wide as u32)
    };
    for _ in 0..10 {
        let (high_0, low_0) = product(0xD251_1F53, counter[0]);
        let (high_2, low_2) = product(0xCD9E_8D57, counter[2]);
        counter = [
            high_2 ^ counter[1] ^ key[0],
            low_2,
            high_0 ^ counter[3] ^ key[1],
            low_0,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}
