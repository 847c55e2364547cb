// Where the bytes of a sender's KV blocks belong in the blocks of a receiver that cuts the same tokens into blocks of
// another size. Pure: offsets in, offsets out.
#pragma once

#include <cstdint>
#include <vector>

#include "src/model/kv_cache.h"

namespace tandem::transfer {

// Bytes that are neighbours on both sides.
struct CopyRun {
  int64_t block = 0;   // of the receiver, as an index in the prompt
  int64_t offset = 0;  // in that block
  int64_t bytes = 0;
};

// A block is a row of *strips*: what one strip holds of a token is as large in blocks of every size, and lies in the order
// of tokens. So a strip is cut where the receiver's blocks end, and every strip alike. Which strips there are follows from
// KvLayerView in src/kernels/ops.h:
//   MLA: the rows; with 8 bits a strip of scales behind them. GQA: for each head and pair of dimensions one of k, then
//   one for all of v, with 8 bits two of scales.
// In v two neighbouring tokens lie side by side by pairs. If both sizes are even, pairs stay together; otherwise v is
// mapped element by element.
class BlockMap {
 public:
  // The layouts are alike but for block_size.
  BlockMap(const model::KvLayout& from, const model::KvLayout& to);

  // Appends where bytes [begin, end) of the sender's block number `block` of a prompt belong, in the order of these bytes.
  void find(int64_t block, int64_t begin, int64_t end, std::vector<CopyRun>& runs) const;
  // Blocks of both sides are rows of tokens, so that runs are long; otherwise one may be as short as an element.
  bool is_by_token() const { return strips_.size() == 1; }

 private:
  struct Strip {
    int64_t from_offset = 0;  // in the sender's block
    int64_t to_offset = 0;    // in the receiver's
    int64_t token_bytes = 0;
    bool is_woven = false;  // v, if a pair of one side may be none on the other
  };

  void add(int64_t token_bytes, bool is_woven = false);
  void find_rows(const Strip& strip, int64_t block, int64_t begin, int64_t end, std::vector<CopyRun>& runs) const;
  void find_woven(const Strip& strip, int64_t block, int64_t begin, int64_t end, std::vector<CopyRun>& runs) const;

  const int64_t from_tokens_;  // of a block
  const int64_t to_tokens_;
  const int64_t element_bytes_;
  const int64_t head_dim_;
  std::vector<Strip> strips_;  // in the order of their offsets, without gaps
};

}  // namespace tandem::transfer
