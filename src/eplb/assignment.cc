#include "src/eplb/assignment.h"

#include <limits>

#include "src/base/check.h"

namespace tandem::eplb {
namespace {

constexpr int64_t kInfinity = std::numeric_limits<int64_t>::max() / 2;
constexpr size_t kNone = std::numeric_limits<size_t>::max();

// Prices keep every reduced cost cost - row - column at 0 or above, and at 0 for what is assigned.
struct Prices {
  std::vector<int64_t> row;
  std::vector<int64_t> column;
};

// Adds one row to the assignment: Dijkstra over reduced costs from it to the nearest free column, then turns the path.
void assign_row(std::span<const int32_t> gains, size_t n, size_t first_row, Prices& prices,
                std::vector<size_t>& row_of_column) {
  std::vector<int64_t> distance(n, kInfinity);
  std::vector<size_t> came_from(n, kNone);  // the column before, on the path
  std::vector<uint8_t> is_done(n);
  size_t row = first_row;
  size_t column = kNone;
  int64_t reached = 0;
  do {
    size_t nearest = kNone;
    for (size_t c = 0; c < n; ++c) {
      if (is_done[c] != 0) continue;
      const int64_t reduced = -int64_t{gains[row * n + c]} - prices.row[row] - prices.column[c];
      if (reached + reduced < distance[c]) {
        distance[c] = reached + reduced;
        came_from[c] = column;
      }
      if (nearest == kNone || distance[c] < distance[nearest]) nearest = c;
    }
    CHECK_NE(nearest, kNone);
    column = nearest;
    reached = distance[column];
    is_done[column] = 1;
    row = row_of_column[column];
  } while (row != kNone);

  prices.row[first_row] += reached;
  for (size_t c = 0; c < n; ++c) {
    if (is_done[c] == 0 || c == column) continue;
    prices.column[c] -= reached - distance[c];
    prices.row[row_of_column[c]] += reached - distance[c];
  }
  while (column != kNone) {
    const size_t before = came_from[column];
    row_of_column[column] = before == kNone ? first_row : row_of_column[before];
    column = before;
  }
}

}  // namespace

std::vector<int32_t> assign_best(std::span<const int32_t> gains, int64_t n) {
  const size_t count = static_cast<size_t>(n);
  CHECK_EQ(gains.size(), count * count);
  // Costs are negative gains; row prices start where every reduced cost is at least 0.
  Prices prices{std::vector<int64_t>(count), std::vector<int64_t>(count)};
  for (size_t r = 0; r < count; ++r) {
    for (size_t c = 0; c < count; ++c) prices.row[r] = std::min(prices.row[r], -int64_t{gains[r * count + c]});
  }
  std::vector<size_t> row_of_column(count, kNone);
  for (size_t r = 0; r < count; ++r) assign_row(gains, count, r, prices, row_of_column);
  std::vector<int32_t> column_of_row(count);
  for (size_t c = 0; c < count; ++c) column_of_row[row_of_column[c]] = static_cast<int32_t>(c);
  return column_of_row;
}

}  // namespace tandem::eplb
