/* Bipartite soft matching (arXiv 2210.09461, section 3), from the keys of all heads to a plan.

   The result is that of `tokenmerge.matching.bipartite`, ties included: equal similarities go to the lower A position, then
   to the lower B position. Every similarity is a sum over the channels in the same order, so that equal keys have equal
   similarities. A token that is not a number counts as the most similar one, as in PyTorch. */

#include "rows.h"

#ifdef __AVX512F__
#define ROWS 8 /* A tokens that are compared at once: one register of 16 sums for each */
#else
#define ROWS 4
#endif
#define LANES 16

typedef struct {
    const char *keys;
    int dtype;
    i64 batch, heads, tokens, dim;
    i64 per_image, per_head, per_token; /* strides in numbers */
    i64 r, is_protected;
    i64 *kept, *source, *target;
    /* sizes that follow from these */
    i64 first_a, first_b, count_a, count_b, tiles_b, padded;
    /* memory of one image: unit keys of A `[count_a, padded]` and of B `[tiles_b, padded, LANES]`, best similarity and
       partner of each A token, and whether tokens are not numbers */
    float *scratch;
    i64 per_scratch;
} Job;

static float *unit_a(const Job *job, i64 image) { return job->scratch + image * job->per_scratch; }
static float *unit_b(const Job *job, i64 image) { return unit_a(job, image) + job->count_a * job->padded; }
static float *best_of(const Job *job, i64 image) { return unit_b(job, image) + job->tiles_b * LANES * job->padded; }
static int32_t *partner_of(const Job *job, i64 image) { return (int32_t *)(best_of(job, image) + job->count_a + LANES); }
static int32_t *broken_of(const Job *job, i64 image) { return partner_of(job, image) + job->count_a + LANES; }

static i64 scratch_floats(i64 count_a, i64 tiles_b, i64 padded, i64 tokens) {
    return count_a * padded + tiles_b * LANES * padded + 2 * (count_a + LANES) + tokens + LANES;
}

/* Sum the keys of one token over the heads, and divide the sum by its norm. */
static int unit_key(const Job *job, i64 image, i64 token, float *sum) {
    const char *first = job->keys + width_of(job->dtype) * (size_t)(image * job->per_image + token * job->per_token);
    read_row(first, job->dtype, job->dim, sum);
    for (i64 head = 1; head < job->heads; head++) {
        const char *at = first + width_of(job->dtype) * (size_t)(head * job->per_head);
        add_row(at, job->dtype, job->dim, sum);
    }
    for (i64 d = job->dim; d < job->padded; d++) sum[d] = 0;
    f16x squares = {0};
    for (i64 d = 0; d < job->padded; d += LANES) {
        f16x part = *(f16x *)(sum + d);
        squares += part * part;
    }
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += squares[lane];
    float norm = sqrtf(total);
    norm = norm < 1e-12f ? 1e-12f : norm;
    int broken = 0;
    for (i64 d = 0; d < job->dim; d++) {
        sum[d] /= norm;
        broken |= sum[d] != sum[d];
    }
    return broken;
}

static void unit_keys(const Job *job, i64 image, i64 from, i64 to, float *sum) {
    float *a = unit_a(job, image), *b = unit_b(job, image);
    int32_t *broken = broken_of(job, image);
    for (i64 token = from; token < to; token++) {
        broken[token] = unit_key(job, image, token, sum);
        if ((token - job->first_a) % 2 == 0) {
            memcpy(a + (token - job->first_a) / 2 * job->padded, sum, 4 * (size_t)job->padded);
        } else {
            i64 place = (token - job->first_b) / 2;
            float *column = b + place / LANES * LANES * job->padded + place % LANES;
            for (i64 d = 0; d < job->dim; d++) column[d * LANES] = sum[d];
        }
    }
}

/* Find the best edge of up to ROWS A tokens. */
static void best_edges(const Job *job, i64 image, i64 first) {
    const float *a = unit_a(job, image) + first * job->padded, *b = unit_b(job, image);
    i64 rows = job->count_a - first < ROWS ? job->count_a - first : ROWS;
    f16x best[ROWS];
    i16x where[ROWS], column;
    for (int row = 0; row < ROWS; row++)
        for (int lane = 0; lane < LANES; lane++) best[row][lane] = -INFINITY, where[row][lane] = 0;
    for (int lane = 0; lane < LANES; lane++) column[lane] = lane;
    const float *of[ROWS];
    for (int row = 0; row < ROWS; row++) of[row] = a + (row < rows ? row : 0) * job->padded;
    for (i64 tile = 0; tile < job->tiles_b; tile++, column += LANES) {
        f16x sums[ROWS];
        for (int row = 0; row < ROWS; row++) sums[row] = (f16x){0};
        const float *at = b + tile * LANES * job->padded;
        for (i64 d = 0; d < job->dim; d++, at += LANES) {
            f16x keys = *(const f16x *)at;
            for (int row = 0; row < ROWS; row++) sums[row] += of[row][d] * keys;
        }
        i16x real = column < (int32_t)job->count_b;
        for (int row = 0; row < ROWS; row++) {
            i16x more = (sums[row] > best[row]) & real;
            best[row] = (f16x)(((i16x)sums[row] & more) | ((i16x)best[row] & ~more));
            where[row] = (column & more) | (where[row] & ~more);
        }
    }
    for (int row = 0; row < rows; row++) {
        float most = best[row][0];
        int32_t which = where[row][0];
        for (int lane = 1; lane < LANES; lane++) {
            float value = best[row][lane];
            int32_t place = where[row][lane];
            if (value > most || (value == most && place < which)) most = value, which = place;
        }
        best_of(job, image)[first + row] = most;
        partner_of(job, image)[first + row] = which;
    }
}

/* Let tokens that are not numbers be the most similar ones: of a broken A token the first B token, else the first broken one. */
static void heed_broken(const Job *job, i64 image) {
    const int32_t *broken = broken_of(job, image);
    i64 bad = -1;
    for (i64 place = 0; place < job->count_b && bad < 0; place++)
        if (broken[job->first_b + 2 * place]) bad = place;
    for (i64 place = 0; place < job->count_a; place++) {
        int own = broken[job->first_a + 2 * place];
        if (own || bad >= 0) {
            best_of(job, image)[place] = INFINITY;
            partner_of(job, image)[place] = own ? 0 : (int32_t)bad;
        }
    }
}

/* Rank the edges of one image, and write its plan. */
static void write_plan(const Job *job, i64 image) {
    heed_broken(job, image);
    const float *best = best_of(job, image);
    const int32_t *partner = partner_of(job, image);
    i64 left = job->tokens - job->r, place = 0;
    i64 *kept = job->kept + image * left, *source = job->source + image * job->r, *target = job->target + image * job->r;
    for (; place < job->is_protected; place++) kept[place] = place;
    for (i64 one = 0; one < job->count_a; one++) {
        float own = best[one];
        int32_t rank = 0;
        for (i64 other = 0; other < one; other++) rank += best[other] >= own;
        for (i64 other = one + 1; other < job->count_a; other++) rank += best[other] > own;
        if (rank < job->r) {
            source[rank] = job->first_a + 2 * one;
            target[rank] = left - job->count_b + partner[one];
        } else {
            kept[place++] = job->first_a + 2 * one;
        }
    }
    for (i64 one = 0; one < job->count_b; one++) kept[place++] = job->first_b + 2 * one;
}

static Job job_of(i64 tokens, i64 dim, i64 is_protected) {
    Job job = {.tokens = tokens, .dim = dim, .is_protected = is_protected};
    job.first_a = is_protected + is_protected % 2;
    job.first_b = is_protected + 1 - is_protected % 2;
    job.count_a = (tokens - job.first_a + 1) / 2;
    job.count_b = (tokens - job.first_b + 1) / 2;
    job.tiles_b = (job.count_b + LANES - 1) / LANES;
    job.padded = (dim + LANES - 1) / LANES * LANES;
    job.per_scratch = scratch_floats(job.count_a, job.tiles_b, job.padded, tokens);
    return job;
}

/* Return how many floats of scratch memory `tokenmerge_match` needs for each image. */
i64 tokenmerge_scratch(i64 tokens, i64 dim, i64 is_protected) { return job_of(tokens, dim, is_protected).per_scratch; }

/* Return whether rows of float16 can be read and written here. */
i64 tokenmerge_has_float16(void) {
#ifdef __FLT16_MANT_DIG__
    return 1;
#else
    return 0;
#endif
}

/* Match the tokens of a batch. `keys [B, H, N, D]` has the given strides, in numbers, and stride 1 along D. */
void tokenmerge_match(const void *keys, i64 dtype, i64 batch, i64 heads, i64 tokens, i64 dim, i64 per_image, i64 per_head,
                      i64 per_token, i64 r, i64 is_protected, i64 *kept, i64 *source, i64 *target, float *scratch, i64 threads) {
    Job job = job_of(tokens, dim, is_protected);
    job.keys = keys, job.dtype = (int)dtype, job.batch = batch, job.heads = heads;
    job.per_image = per_image, job.per_head = per_head, job.per_token = per_token;
    job.r = r, job.kept = kept, job.source = source, job.target = target, job.scratch = scratch;
    i64 chunks = (tokens + 31) / 32, groups = (job.count_a + ROWS - 1) / ROWS;
    (void)threads; /* without OpenMP */
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        float *row = malloc(4 * (size_t)job.padded);
#pragma omp for schedule(static)
        for (i64 task = 0; task < batch * chunks; task++) {
            i64 from = task % chunks * 32, to = from + 32 < tokens ? from + 32 : tokens;
            i64 first = job.first_a < job.first_b ? job.first_a : job.first_b;
            unit_keys(&job, task / chunks, from > first ? from : first, to, row);
        }
        free(row);
#pragma omp for schedule(static)
        for (i64 task = 0; task < batch * groups; task++) best_edges(&job, task / groups, task % groups * ROWS);
#pragma omp for schedule(static)
        for (i64 image = 0; image < batch; image++) write_plan(&job, image);
    }
}
