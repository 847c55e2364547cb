// How many prompt rows a step may take while streams are running, so that a long prompt never starves them.
//
// The step is given a time, not a number of rows, because a row's cost depends on the machine, the model and the length
// of the context behind it. The budget learns two things from measured steps: how long a step of streams alone takes,
// and the price of a prompt row by the position it stands at, one price per power of two of positions (attention makes
// late rows dearer, smoothly within a prompt, by a jump between prompts). A price is measured at the size of chunk that
// the budget itself chose, so it need not be linear: if `size` rows cost f(size), the next size is time / (f / size),
// which settles where f(size) = time for every f that grows less than proportionally, as reading weights once does.
//
// Pure: time comes in as a value, and equal histories give equal answers. Which rows share a step never changes a
// result (docs/architecture.md, Exactness), so the budget may follow the clock.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

namespace tandem::engine {

// Consecutive rows of one sequence in a step.
struct ChunkRows {
  int64_t first_position = 0;
  int64_t num_rows = 0;
};

class StepBudget {
 public:
  // Chunks are multiples of this (matrices of full tiles, blocks of the cache), and a step that has a prompt to compute
  // takes at least so many of its rows, whatever they cost: a prompt always makes progress.
  static constexpr int64_t kRowMultiple = 16;

  explicit StepBudget(int64_t max_step_us) : max_step_us_(max_step_us) {}  // 0: no limit

  // Time for prompt rows beside the streams of a step; nothing if steps are not limited.
  std::optional<double> prompt_us() const;
  // Rows at `position` that fit into `left_us`: a multiple of kRowMultiple, perhaps 0.
  int64_t rows_within(double left_us, int64_t position) const;
  // Expected time of `rows` at `position`; before any measurement all the time there is.
  double cost_us(int64_t rows, int64_t position) const;

  // A step of `chunks` beside streams took step_us. Without chunks it was one of streams alone. Steps without streams
  // are not limited and teach nothing: their chunks are larger and their rows cheaper.
  void learn(std::span<const ChunkRows> chunks, int64_t step_us);

 private:
  static constexpr size_t kNumPrices = 16;  // positions below 1,024, then a price per power of two, to 2^25
  static size_t price_index(int64_t position);
  std::optional<double> row_us(int64_t position) const;

  int64_t max_step_us_;
  double streams_us_ = 0;                                 // a step of streams alone
  std::array<std::optional<double>, kNumPrices> prices_;  // us per row
};

}  // namespace tandem::engine
