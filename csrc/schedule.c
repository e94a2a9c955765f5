/* SPDX-License-Identifier: Apache-2.0
 *
 * schedule.c - runs a pass at once, or chunk by chunk.
 *
 * Chunks of items go through all steps, each in one thread. What a step hands on to the next is then still in the
 * second-level cache. The threads do not wait for each other between steps. The workspace holds a chunk for every
 * thread, however large the batch is.
 *
 * Owns: the workspace of a call.
 */
#include "schedule.h"

#include "spare.h"

enum {
    /* queries or keys that a chunk has at least; with fewer, a projection reads its weights too often */
    MIN_CHUNK_ROWS = 96,
    MAX_SMALL_CHUNK_ROWS = 384, /* one chunk per thread is enough if chunks have at most this many queries or keys */
    CHUNKS_PER_THREAD = 8,      /* otherwise, so that threads end at about the same time; twice as many with padding */
    MAX_EXCESS = 32,            /* one chunk per thread unless a thread gets over 1 / MAX_EXCESS more than its share */
};

typedef struct {
    mha_steps steps;
    const mha_passes *passes;
    const mha_batch *all;
    size_t chunks;
    char *workspaces; /* of all threads */
    size_t bytes;     /* of one */
} chunk_tasks;

mha_status mha_run_at_once(mha_steps steps, const mha_passes *passes, const mha_batch *batch, const mha_team *team)
{
    mha_pass pass;
    mha_plan plan;
    mha_begin_plan(&plan);
    char *workspace = NULL;
    mha_plan_pass(&pass, passes, batch, team, &plan);
    mha_status status = mha_take_workspace(&plan, &workspace);
    if (status == MHA_OK)
        status = steps(&pass);
    mha_give_workspace(workspace);
    return status;
}

/* ---- Chunks ---- */

/* The fewest chunks with which threads end at about the same time. `chunks` is the number that is possible. */
static size_t min_chunks(const mha_batch *batch, size_t rows, size_t threads, size_t chunks)
{
    const size_t N = batch->count;
    if (threads == 1)
        return 2;
    if (batch->index)
        return 2 * CHUNKS_PER_THREAD * threads;
    const size_t busiest = chunks / threads * (N / chunks) + mha_divide_up(N % chunks, threads);
    return mha_divide_up(N, chunks) * rows <= MAX_SMALL_CHUNK_ROWS && busiest * threads - N <= N / MAX_EXCESS
               ? threads
               : CHUNKS_PER_THREAD * threads;
}

/* The number of chunks in which to run a call. 1: all items at once. */
static size_t choose_chunks(const mha_batch *batch, size_t rows, size_t threads)
{
    const size_t items = mha_divide_up(MIN_CHUNK_ROWS, rows), chunks = batch->count / items / threads * threads;
    return chunks == 0 || chunks < min_chunks(batch, rows, threads, chunks) ? 1 : chunks;
}

static mha_batch chunk_at(const chunk_tasks *j, size_t i)
{
    mha_batch chunk = *j->all;
    const size_t first = mha_first_of_part(chunk.count, j->chunks, i);
    chunk.count = mha_first_of_part(chunk.count, j->chunks, i + 1) - first;
    chunk.items += first;
    return chunk;
}

static void plan_chunk(const chunk_tasks *j, const mha_batch *chunk, mha_pass *pass, mha_plan *plan)
{
    const mha_team alone = {.threads = 1, .in_task = true};
    mha_begin_plan(plan);
    mha_plan_pass(pass, j->passes, chunk, &alone, plan);
}

static void chunk_task(void *context, size_t task, size_t worker)
{
    const chunk_tasks *j = context;
    const mha_batch chunk = chunk_at(j, task);
    mha_pass pass;
    mha_plan plan;
    plan_chunk(j, &chunk, &pass, &plan);
    mha_set_pointers(&plan, j->workspaces + worker * j->bytes);
    (void)j->steps(&pass); /* a chunk is stopped only together with the whole loop */
}

static mha_status run_in_chunks(chunk_tasks *j, const mha_team *team)
{
    mha_plan all;
    mha_begin_plan(&all);
    /* Without padding, a plan depends on the count of items alone: that of the first chunk, or that of the last. */
    const size_t step = j->all->index ? 1 : j->chunks - 1;
    for (size_t i = 0; i < j->chunks; i += step) {
        const mha_batch chunk = chunk_at(j, i);
        mha_pass pass;
        mha_plan plan;
        plan_chunk(j, &chunk, &pass, &plan);
        j->bytes = mha_larger(j->bytes, plan.layout.bytes);
    }
    mha_reserve(&all.layout, team->threads, j->bytes, 1);
    mha_status status = mha_take_workspace(&all, &j->workspaces);
    if (status == MHA_OK)
        status = mha_parallel_for(team, j->chunks, chunk_task, j);
    mha_give_workspace(j->workspaces);
    return status;
}

mha_status mha_run_scheduled(mha_steps steps, const mha_passes *passes, const mha_batch *batch, size_t rows,
                             const mha_team *team)
{
    chunk_tasks j = {.steps = steps, .passes = passes, .all = batch,
                     .chunks = choose_chunks(batch, rows, team->threads)};
    return j.chunks > 1 ? run_in_chunks(&j, team) : mha_run_at_once(steps, passes, batch, team);
}
