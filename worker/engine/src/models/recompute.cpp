// A part of a network in the graph of gradients, without its intermediate results: only its inputs are kept, and when
// its gradient is asked for it is computed again. recompute.rs is the other side.
//
// Both times the part is computed with gradients on, on copies of its inputs that begin a graph of their own, so both
// times it takes the same way through the same operations and gives the same bits. The first graph is dropped at once.

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include <ATen/SequenceNumber.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace {

using at::Tensor;
using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Computes a part: takes `count` tensors over, gives a new one, or null and why in `error`.
using Forward = Tensor *(*)(const void *part, Tensor *const *inputs, size_t count, char *error, size_t capacity);
using Release = void (*)(const void *part);

constexpr size_t kErrorBytes = 1024;

// A part that Rust made, owned here.
class Part {
 public:
  Part(const void *part, Forward forward, Release release) : part_(part), forward_(forward), release_(release) {}
  Part(const Part &) = delete;
  Part &operator=(const Part &) = delete;
  ~Part() { release_(part_); }

  Tensor run(const variable_list &inputs) const {
    std::vector<Tensor *> given;
    given.reserve(inputs.size());
    for (const Tensor &input : inputs) given.push_back(new Tensor(input));
    char error[kErrorBytes] = {};
    std::unique_ptr<Tensor> output(forward_(part_, given.data(), given.size(), error, sizeof error));
    if (!output) throw std::runtime_error(error);
    return *output;
  }

 private:
  const void *part_;
  Forward forward_;
  Release release_;
};

// The same values at the beginning of a graph of their own.
variable_list apart(const variable_list &inputs) {
  variable_list own;
  own.reserve(inputs.size());
  for (const Tensor &input : inputs) {
    Tensor x = input.detach();
    x.set_requires_grad(input.requires_grad());
    own.push_back(std::move(x));
  }
  return own;
}

// The leaves other than `inputs` that `output` depends on: the part's own parameters. Its graph must begin with node
// number `first`: a part that holds a tensor of the graph around it would have that graph freed below it.
variable_list parameters_of(const Tensor &output, const variable_list &inputs, uint64_t first) {
  variable_list parameters;
  std::unordered_set<Node *> seen;
  std::vector<Node *> open{output.grad_fn().get()};
  while (!open.empty()) {
    Node *node = open.back();
    open.pop_back();
    if (node == nullptr || !seen.insert(node).second) continue;
    if (auto *leaf = dynamic_cast<AccumulateGrad *>(node)) {
      const auto same = [&](const Tensor &input) { return input.is_same(leaf->variable); };
      if (std::none_of(inputs.begin(), inputs.end(), same)) parameters.push_back(leaf->variable);
      continue;
    }
    if (node->sequence_nr() < first) {
      throw std::logic_error("a part that is computed again depends on more than its inputs and leaves");
    }
    for (const Edge &edge : node->next_edges()) open.push_back(edge.function.get());
  }
  return parameters;
}

// Stands for the part in the graph: its edges lead to its inputs, then to its parameters.
struct Recompute : Node {
  std::shared_ptr<Part> part;
  std::vector<SavedVariable> inputs;
  variable_list parameters;

  std::string name() const override { return "Recompute"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    part.reset();
    inputs.clear();
    parameters.clear();
  }

  variable_list apply(variable_list &&gradients) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list results(num_outputs());
    if (!gradients[0].defined()) return results;
    if (!part) throw std::runtime_error("the graph of a part was used before");
    at::AutoGradMode gradients_on(true);
    variable_list given;
    for (const SavedVariable &input : inputs) given.push_back(input.unpack());
    variable_list own = apart(given);
    const Tensor output = part->run(own);
    variable_list wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < results.size(); ++i) {
      const Tensor &x = i < own.size() ? own[i] : parameters[i - own.size()];
      if (!x.requires_grad() || !task_should_compute_output(i)) continue;
      wanted.push_back(x);
      places.push_back(i);
    }
    if (wanted.empty()) return results;
    const variable_list found = torch::autograd::grad({output}, wanted, {gradients[0]}, /*retain_graph=*/false,
                                                      /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) results[places[i]] = found[i];
    return results;
  }
};

Tensor recompute(const variable_list &inputs, const std::shared_ptr<Part> &part) {
  if (!at::GradMode::is_enabled()) return part->run(inputs);
  const uint64_t first = at::sequence_number::peek();
  const variable_list own = apart(inputs);
  const Tensor output = part->run(own);
  if (!output.requires_grad()) return output;
  auto node = std::shared_ptr<Recompute>(new Recompute(), torch::autograd::deleteNode);
  node->parameters = parameters_of(output, own, first);
  node->part = part;
  torch::autograd::edge_list edges;
  for (const Tensor &input : inputs) {
    node->inputs.emplace_back(input, /*is_output=*/false);
    edges.push_back(input.requires_grad() ? torch::autograd::impl::gradient_edge(input) : Edge());
  }
  for (const Tensor &leaf : node->parameters) edges.push_back(torch::autograd::impl::gradient_edge(leaf));
  node->set_next_edges(std::move(edges));
  Tensor result = output.variable_data();
  torch::autograd::set_history(result, node);
  return result;
}

void say(const char *what, char *error, size_t capacity) {
  if (capacity == 0) return;
  std::strncpy(error, what, capacity - 1);
  error[capacity - 1] = '\0';
}

}  // namespace

// Computes `part` of `count` borrowed tensors. Takes `part` over, also on failure, and calls `release` once, when no
// graph needs it any more. Gives a new tensor, or null and why in `error`.
extern "C" Tensor *distillery_recompute(Tensor *const *inputs, size_t count, const void *part, Forward forward,
                                        Release release, char *error, size_t capacity) noexcept {
  try {
    const auto owned = std::make_shared<Part>(part, forward, release);
    variable_list given;
    for (size_t i = 0; i < count; ++i) given.push_back(*inputs[i]);
    return new Tensor(recompute(given, owned));
  } catch (const std::exception &failure) {
    say(failure.what(), error, capacity);
  } catch (...) {
    say("a failure without words", error, capacity);
  }
  return nullptr;
}
