// Causal attention for training on a CPU, in float32. Scores, softmax and their gradients stay in the L2 cache; blocks of
// scores that are masked everywhere (the upper triangle, other documents) are never computed. As in FlashAttention (Dao et
// al. 2022, 2205.14135) the backward pass computes the scores again.
//
// Axis letters: B batch · H heads · K key/value heads · T tokens (a multiple of BLOCK) · S keys of a block of queries ·
// D head_dim (a multiple of 16).

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Queries per block, and floats per vector register: macros of the compiler's command line.
constexpr int64_t BLOCK = QUERIES, LANES = NUMBERS;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Anywhere*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }

inline float sum(Vector x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

// exp(x) for x ≤ 0, to within a few units in the last place; 0 for x < -87; NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector shift = broadcast(12582912.0f);  // 1.5 · 2²³: adding it rounds to the nearest integer, in the lowest bits
  const Vector shifted = x * 1.44269504f + shift;
  const Vector whole = shifted - shift;
  const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // log 2 in two parts, for precision
  Vector p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Integers power = ((Integers)shifted - (Integers)shift + 127) << 23;
  return x < -87.0f ? Vector{} : p * (Vector)power;
}

// out (R, LANES · N), rows ldo apart, = (or +=) Σ w[r · a + i · b] · x[i · ldx + ...] over i < n.
template <int R, int N, bool ADD>
inline void tile(const float* w, int64_t a, int64_t b, const float* x, int64_t ldx, int64_t n, float* out, int64_t ldo) {
  Vector total[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) total[r][c] = ADD ? load(out + r * ldo + c * LANES) : Vector{};
  for (int64_t i = 0; i < n; i++) {
    Vector row[N];
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) row[c] = load(x + i * ldx + c * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vector weight = broadcast(w[r * a + i * b]);
#pragma GCC unroll 4
      for (int c = 0; c < N; c++) total[r][c] += weight * row[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < N; c++) store(out + r * ldo + c * LANES, total[r][c]);
}

// The same for rows in multiples of 8 and columns in multiples of 16.
template <bool ADD>
void multiply(int64_t rows, int64_t columns, int64_t n, const float* w, int64_t a, int64_t b, const float* x, int64_t ldx,
              float* out, int64_t ldo) {
  int64_t c = 0;
  // As many accumulators as there are registers for: 32 of 16 floats, or 16 of 8.
  if constexpr (LANES == 16)
    for (; c + 4 * LANES <= columns; c += 4 * LANES)
      for (int64_t r = 0; r < rows; r += 4) tile<4, 4, ADD>(w + r * a, a, b, x + c, ldx, n, out + r * ldo + c, ldo);
  constexpr int ROWS = LANES == 16 ? 8 : 4;
  for (; c + 2 * LANES <= columns; c += 2 * LANES)
    for (int64_t r = 0; r < rows; r += ROWS)
      tile<ROWS, 2, ADD>(w + r * a, a, b, x + c, ldx, n, out + r * ldo + c, ldo);
  for (; c < columns; c += LANES)
    for (int64_t r = 0; r < rows; r += 8) tile<8, 1, ADD>(w + r * a, a, b, x + c, ldx, n, out + r * ldo + c, ldo);
}

// Transpose x (T, D), rows ldx apart, into out (D, T), rows ldo apart.
void transpose(const float* x, int64_t ldx, int64_t T, int64_t D, float* out, int64_t ldo) {
  for (int64_t t = 0; t < T; t += LANES)
    for (int64_t d = 0; d < D; d++)
      for (int64_t i = 0; i < LANES; i++) out[d * ldo + t + i] = x[(t + i) * ldx + d];
}

// A (B, heads, T, D) tensor that is contiguous along D; strides in floats.
struct Tensor {
  float* data;
  int64_t batch, head, token;
  float* at(int64_t b, int64_t h, int64_t t = 0) const { return data + b * batch + h * head + t * token; }
};

struct Sizes {
  int64_t B, H, K, T, D;
};

// The first token that any query of the block from t on sees, rounded down to a whole block. first: (T,), the first token
// that each token sees, never decreasing; null: token 0.
int64_t block_start(const int64_t* first, int64_t t) { return first ? first[t] / BLOCK * BLOCK : 0; }

// Scores of the block of queries from t on with the keys s0 ... t + BLOCK: (BLOCK, t + BLOCK - s0), rows ld apart;
// -∞ for keys that a query does not see.
void scores(const Tensor& q, int64_t b, int64_t h, int64_t t, int64_t s0, int64_t D, const int64_t* first,
            const float* keys, float* out, int64_t ld) {
  multiply<false>(BLOCK, t + BLOCK - s0, D, q.at(b, h, t), q.token, 1, keys + s0, ld, out, ld);
  for (int64_t r = 0; r < BLOCK; r++) {
    for (int64_t s = t + r + 1; s < t + BLOCK; s++) out[r * ld + s - s0] = -INFINITY;
    if (first)
      for (int64_t s = s0; s < first[t + r]; s++) out[r * ld + s - s0] = -INFINITY;
  }
}

}  // namespace

extern "C" {

// out: (B, H, T, D). logsum: (B, H, T), the logarithm of each softmax's denominator. first: (B, T) or null, the first
// token that each token sees: it may not decrease along T.
void attention_forward(const Sizes* sizes, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out,
                       const int64_t* first, float* logsum, float scale, int threads) {
  const auto [B, H, K, T, D] = *sizes;
  const int64_t ld = T + LANES;  // rows a power of two apart would compete for the same cache sets
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> keys(D * ld), weights(BLOCK * ld);
    float* p = weights.data();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * K; task++) {
      const int64_t b = task / K, j = task % K;
      const int64_t* row_first = first ? first + b * T : nullptr;
      transpose(k->at(b, j), k->token, T, D, keys.data(), ld);
      for (int64_t h = j * (H / K); h < (j + 1) * (H / K); h++)
        for (int64_t t = 0; t < T; t += BLOCK) {
          const int64_t s0 = block_start(row_first, t), S = t + BLOCK - s0;
          scores(*q, b, h, t, s0, D, row_first, keys.data(), p, ld);
          for (int64_t r = 0; r < BLOCK; r++) {
            float* row = p + r * ld;
            Vector most = load(row);
            for (int64_t s = LANES; s < S; s += LANES) {
              const Vector x = load(row + s);
              most = most > x ? most : x;
            }
            float largest = most[0];
            for (int i = 1; i < LANES; i++) largest = largest > most[i] ? largest : most[i];
            Vector total{};
            for (int64_t s = 0; s < S; s += LANES) {
              const Vector e = exponential((load(row + s) - largest) * scale);
              store(row + s, e);
              total += e;
            }
            const float denominator = sum(total);
            for (int64_t s = 0; s < S; s += LANES) store(row + s, load(row + s) * (1 / denominator));
            logsum[(b * H + h) * T + t + r] = largest * scale + std::log(denominator);
          }
          multiply<false>(BLOCK, D, S, p, ld, 1, v->at(b, j, s0), v->token, out->at(b, h, t), out->token);
        }
    }
  }
}

// Gradients dq, dk, dv of q, k, v from dout, that of `out`. With weights P and dP = dout · vᵀ, those of the scores are
// P · (dP - Σ dout · out) (2205.14135, appendix B.4).
void attention_backward(const Sizes* sizes, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out,
                        const Tensor* dout, const int64_t* first, const float* logsum, const Tensor* dq, const Tensor* dk,
                        const Tensor* dv, float scale, int threads) {
  const auto [B, H, K, T, D] = *sizes;
  const int64_t ld = T + LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> keys(D * ld), values(D * ld), weights(BLOCK * ld), slopes(BLOCK * ld);
    float *p = weights.data(), *ds = slopes.data();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * K; task++) {
      const int64_t b = task / K, j = task % K;
      const int64_t* row_first = first ? first + b * T : nullptr;
      transpose(k->at(b, j), k->token, T, D, keys.data(), ld);
      transpose(v->at(b, j), v->token, T, D, values.data(), ld);
      for (int64_t t = 0; t < T; t++)
        for (int64_t d = 0; d < D; d += LANES) {
          store(dk->at(b, j, t) + d, Vector{});
          store(dv->at(b, j, t) + d, Vector{});
        }
      for (int64_t h = j * (H / K); h < (j + 1) * (H / K); h++)
        for (int64_t t = 0; t < T; t += BLOCK) {
          const int64_t s0 = block_start(row_first, t), S = t + BLOCK - s0;
          const float *queries = q->at(b, h, t), *upstream = dout->at(b, h, t);
          scores(*q, b, h, t, s0, D, row_first, keys.data(), p, ld);
          multiply<false>(BLOCK, S, D, upstream, dout->token, 1, values.data() + s0, ld, ds, ld);
          for (int64_t r = 0; r < BLOCK; r++) {
            Vector inner{};
            for (int64_t d = 0; d < D; d += LANES)
              inner += load(upstream + r * dout->token + d) * load(out->at(b, h, t + r) + d);
            const float mean = sum(inner), denominator = logsum[(b * H + h) * T + t + r];
            for (int64_t s = 0; s < S; s += LANES) {
              const Vector weight = exponential(load(p + r * ld + s) * scale - denominator);
              store(p + r * ld + s, weight);
              store(ds + r * ld + s, weight * (load(ds + r * ld + s) - mean) * scale);
            }
          }
          multiply<false>(BLOCK, D, S, ds, ld, 1, k->at(b, j, s0), k->token, dq->at(b, h, t), dq->token);
          multiply<true>(S, D, BLOCK, ds, 1, ld, queries, q->token, dk->at(b, j, s0), dk->token);
          multiply<true>(S, D, BLOCK, p, 1, ld, upstream, dout->token, dv->at(b, j, s0), dv->token);
        }
    }
  }
}
}
