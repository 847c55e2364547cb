#include "src/ep/dispatcher.h"

#include <cstring>

namespace tandem::ep {

void Dispatcher::send_records(int32_t to, std::span<const int32_t> rows, int64_t first_record) {
  size_t begin = 0;
  while (begin < rows.size()) {
    size_t end = begin + 1;
    while (end < rows.size() && rows[end] == rows[end - 1] + 1) ++end;
    send_block(to, rows[begin], static_cast<int64_t>(end - begin), first_record + static_cast<int64_t>(begin));
    begin = end;
  }
}

void Dispatcher::send_all_records(int32_t to, int64_t num_rows, int64_t first_record) {
  if (num_rows > 0) send_block(to, 0, num_rows, first_record);
}

void Dispatcher::send_block(int32_t to, int64_t row, int64_t count, int64_t first_record) {
  CHECK_LE(first_record + count, plan_.num_records);
  const int64_t source = window_offset_ + plan_.record_offset(plan_.first_own(own_rank()) + row);
  fabric_.put(group::RankId(to), window_offset_ + plan_.record_offset(first_record),
              fabric_.window().subspan(static_cast<size_t>(source), static_cast<size_t>(count * plan_.record_bytes)));
}

std::unique_ptr<Dispatcher> make_dispatcher(const DispatcherParts& parts) {
  switch (parts.plan.backend) {
    case All2All::kNaive: return make_naive_dispatcher(parts);
    case All2All::kAllGather:
    case All2All::kLowLatency: return make_rank_major_dispatcher(parts);
    case All2All::kHighThroughput: return make_counted_dispatcher(parts);
  }
  CHECK(false);
  return nullptr;
}

}  // namespace tandem::ep
