//! What a UNet keeps of a forward pass for the backward pass, module by module.
//!
//! Counted is what libtorch's nodes save: a norm, a silu and a gelu their input; attention its queries, keys, values,
//! result and the logarithms of its sums (its fused form, which never holds the weights); a product both factors; a
//! convolution its input; a linear map its input where it is trained or has an adapter, whose inner result is saved too.
//! Sums save nothing. What one module saves as its result is the next one's input and is counted there.

use crate::teacher::{Level, UnetConfig};

/// Bytes of an f32.
const F32: i64 = 4;

/// What a forward pass with gradients is made of.
pub(super) struct Pass<'a> {
    pub(super) config: &'a UnetConfig,
    /// Height and width of the latent.
    pub(super) side: [i64; 2],
    /// Latents in the pass.
    pub(super) rows: i64,
    /// Tokens of a text.
    pub(super) text: i64,
    /// Bytes of a number of the compute format.
    pub(super) number: i64,
    /// Inner width of the adapters; 0 without.
    pub(super) lora_rank: i64,
    /// Whether the module at a path is trained, or has an adapter.
    pub(super) trained: &'a dyn Fn(&str) -> bool,
}

/// A module that can be computed again, in bytes.
#[derive(Clone, Copy, Default)]
struct Module {
    /// What is kept of it in any case.
    input: i64,
    /// What is kept besides, unless it is computed again.
    inner: i64,
    /// What its backward pass needs besides at a time.
    working: i64,
    /// What it needs at a time without gradients.
    forward: i64,
}

/// A pass's activations, in bytes.
#[derive(Default)]
pub(super) struct Activations {
    modules: Vec<Module>,
    /// Kept between the modules.
    between: i64,
    /// Results on the way down, for the way up.
    skips: i64,
}

impl Activations {
    /// The most that a forward and backward pass holds at a time.
    pub(super) fn peak(&self, recompute: bool) -> i64 {
        let most = |of: &dyn Fn(&Module) -> i64| self.modules.iter().map(of).max().unwrap_or(0);
        let inputs: i64 = self.modules.iter().map(|module| module.input).sum();
        let inner: i64 = self.modules.iter().map(|module| module.inner).sum();
        match recompute {
            true => self.between + inputs + most(&|module| module.inner + module.working),
            false => self.between + inputs + inner + most(&|module| module.working),
        }
    }

    /// The most that a forward pass without gradients holds at a time.
    pub(super) fn without_gradients(&self) -> i64 {
        let most = self.modules.iter().map(|module| module.forward).max();
        self.skips + most.unwrap_or(0)
    }
}

/// The activations of `pass`.
pub(super) fn activations(pass: &Pass<'_>) -> Activations {
    let mut found = Activations::default();
    let config = pass.config;
    let last = config.channels.len() - 1;
    let sides: Vec<i64> = (0..=last).map(|level| pass.pixels(level)).collect();
    let mut input = config.channels[0];
    found.skips += pass.bytes(sides[0] * input);
    for level in 0..=last {
        let (output, pixels) = (config.channels[level], sides[level]);
        for layer in 0..config.layers[level] {
            let at = |name: &str| format!("down_blocks.{level}.{name}.{layer}");
            found.resnet(pass, &at("resnets"), [input, output], pixels);
            if config.down[level] == Level::CrossAttention {
                found.transformer(pass, &at("attentions"), level, pixels);
            }
            found.skips += pass.bytes(pixels * output);
            input = output;
        }
        if level < last {
            found.between += pass.bytes(pixels * output);
            found.skips += pass.bytes(sides[level + 1] * output);
        }
    }
    let (coarsest, pixels) = (config.channels[last], sides[last]);
    found.resnet(pass, "mid_block.resnets.0", [coarsest; 2], pixels);
    found.transformer(pass, "mid_block.attentions.0", last, pixels);
    found.resnet(pass, "mid_block.resnets.1", [coarsest; 2], pixels);
    found.way_up(pass, &sides);
    // The norm, silu and convolution at the end.
    found.between += pass.bytes(3 * sides[0] * config.channels[0]);
    found
}

impl Activations {
    fn way_up(&mut self, pass: &Pass<'_>, sides: &[i64]) {
        let config = pass.config;
        let last = config.channels.len() - 1;
        let mut skips = config.skip_channels();
        let mut input = config.channels[last];
        for block in 0..=last {
            let level = last - block;
            let (output, pixels) = (config.channels[level], sides[level]);
            for layer in 0..=config.layers[level] {
                let at = |name: &str| format!("up_blocks.{block}.{name}.{layer}");
                let skip = skips.pop().unwrap_or(0);
                self.resnet(pass, &at("resnets"), [input + skip, output], pixels);
                if config.up[block] == Level::CrossAttention {
                    self.transformer(pass, &at("attentions"), level, pixels);
                }
                input = output;
            }
            if level > 0 {
                self.between += pass.bytes(sides[level - 1] * output);
            }
        }
    }

    fn resnet(&mut self, pass: &Pass<'_>, path: &str, [input, output]: [i64; 2], pixels: i64) {
        let mut inner = pass.bytes(pixels * (2 * input + 3 * output));
        inner += pass.adapter(&format!("{path}.conv1"), [9 * input, output], pixels);
        inner += pass.adapter(&format!("{path}.conv2"), [9 * output, output], pixels);
        // The shortcut is not computed again.
        if input != output {
            self.between += pass.adapter(&format!("{path}.conv_shortcut"), [input, output], pixels);
        }
        self.modules.push(Module {
            input: pass.bytes(pixels * input),
            inner,
            working: pass.bytes(2 * pixels * (input + output)),
            forward: pass.bytes(2 * pixels * (input + output)),
        });
    }

    fn transformer(&mut self, pass: &Pass<'_>, path: &str, level: usize, pixels: i64) {
        let width = pass.config.channels[level];
        let one = pass.bytes(pixels * width);
        let is_linear = pass.config.linear_projection;
        self.between += one;
        for projection in ["proj_in", "proj_out"] {
            let path = format!("{path}.{projection}");
            if !is_linear || (pass.trained)(&path) {
                self.between += one;
            }
            self.between += pass.adapter(&path, [width; 2], pixels);
        }
        let block = |index| {
            let path = format!("{path}.transformer_blocks.{index}");
            pass.block(&path, level, pixels)
        };
        self.modules
            .extend((0..pass.config.depths[level]).map(block));
    }
}

impl Pass<'_> {
    /// Pixels of a latent at `level`: the sides are halved, upwards, from one to the next.
    fn pixels(&self, level: usize) -> i64 {
        let halved = |side: i64| (0..level).fold(side, |side, _| (side + 1) / 2);
        halved(self.side[0]) * halved(self.side[1])
    }

    /// Bytes of `numbers` for each row, in the compute format.
    fn bytes(&self, numbers: i64) -> i64 {
        numbers * self.rows * self.number
    }

    /// What the adapter at `path`, if there is one, saves for `tokens` of each row: its inner result, and its matrices,
    /// which are f32, in the compute format where that is another.
    fn adapter(&self, path: &str, [input, output]: [i64; 2], tokens: i64) -> i64 {
        if self.lora_rank == 0 || !(self.trained)(path) {
            return 0;
        }
        let copies = match self.number {
            F32 => 0,
            number => number * self.lora_rank * (input + output),
        };
        self.bytes(tokens * self.lora_rank) + copies
    }

    /// A transformer block: its input, and what it saves besides.
    fn block(&self, path: &str, level: usize, pixels: i64) -> Module {
        let (width, context) = (self.config.channels[level], self.config.context_width);
        let heads = self.config.heads[level];
        let trained = |name: &str| (self.trained)(&format!("{path}.{name}"));
        let any = |names: &[&str]| i64::from(names.iter().any(|name| trained(name)));
        // The numbers of one state: three norms' inputs but the first, which is the block's; q, k, v and result of one
        // attention, q and result of the other; the gate, its gelu, their product.
        let mut states = 2 + 4 + 2 + 8 + 4;
        states += any(&["attn1.to_q", "attn1.to_k", "attn1.to_v"]);
        states += any(&["attn2.to_q"]) + any(&["ff.net.0.proj"]);
        states += 4 * any(&["ff.net.2"]);
        let mut inner = self.bytes(states * pixels * width + 2 * self.text * width);
        // Logarithms of two attentions; mean and deviation of three norms.
        inner += F32 * self.rows * pixels * (2 * heads + 6);
        for (name, input, output, tokens) in [
            ("attn1.to_q", width, width, pixels),
            ("attn1.to_k", width, width, pixels),
            ("attn1.to_v", width, width, pixels),
            ("attn1.to_out.0", width, width, pixels),
            ("attn2.to_q", width, width, pixels),
            ("attn2.to_k", context, width, self.text),
            ("attn2.to_v", context, width, self.text),
            ("attn2.to_out.0", width, width, pixels),
            ("ff.net.0.proj", width, 8 * width, pixels),
            ("ff.net.2", 4 * width, width, pixels),
        ] {
            inner += self.adapter(&format!("{path}.{name}"), [input, output], tokens);
        }
        Module {
            input: self.bytes(pixels * width),
            inner,
            // Where most is held: the gradients of the result, of the product and of its two factors, 1 + 4 + 8, while
            // the product, 4, is gone.
            working: self.bytes(9 * pixels * width),
            // The gate, its gelu and their product.
            forward: self.bytes(16 * pixels * width),
        }
    }
}
