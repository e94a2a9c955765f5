/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.c - the thread pool: idle threads help a caller that runs a parallel loop.
 *
 * Owns: the workers, and the one static `pool` through which they are reached. Nothing here is allocated or freed.
 * Assumes: lock-free atomics, and that tasks do not fork. should_stop() may fork.
 *
 * The caller never needs a worker. It puts its loop, which is on its own stack, behind a gate with threads - 1 free
 * seats, and starts on the tasks itself. Workers that come in time take a seat, help, and leave. When the tasks have
 * run out, the caller closes the gate and waits for the workers inside. A worker that wakes up late finds the gate
 * closed and touches nothing. So no loop waits for a thread that the system has not scheduled yet, or that did not
 * survive a fork.
 *
 * Workers are detached and never end. Between loops they spin or sleep on the static pool. They hold no lock and own
 * nothing. So neither a forked child nor the end of the process has anything to wait for or to clean up.
 *
 * Workers take over the caller's floating-point environment. Nothing here sets flush-to-zero.
 */
#include "threads.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "processors.h"

enum {
#if defined(__linux__)
    FUTEX_WAIT_PRIVATE = 128, /* from <linux/futex.h>, which musl lacks */
    FUTEX_WAKE_PRIVATE = 129,
#endif
    /* variables that one thread writes and others watch are on lines of their own: 64 bytes in pairs, or 128 */
    CACHE_LINE = 128,
    SPIN_NS = 200000, /* some times longer than waking a thread takes; on virtual machines that can be milliseconds */
};

/* pool.gate: free seats in the upper half. Below them, the number of workers inside, and whether the caller sleeps
 * until they have left. */
enum { INSIDE = 0x7fff, CALLER_SLEEPS = 0x8000, SEAT = 0x10000 };

_Static_assert((int)MHA_MAX_THREADS <= (int)INSIDE, "every thread can be counted in the gate");

struct loop {
    mha_task run;
    void *context;
    size_t tasks;
    fenv_t environment; /* the caller's rounding mode and exception flags */
    int cpu;            /* the caller's CPU, which workers leave; -1: there are too few CPUs for that */
    atomic_bool stopped;      /* should_stop() returned true */
    alignas(CACHE_LINE) atomic_size_t next; /* the next ticket, which is the index of a task */
};

/* All zero in a fresh process, and again in a forked child. The caller that holds `busy` owns the fields that are not
 * atomic. */
static struct {
    atomic_bool busy;
    unsigned workers;     /* the number of workers */
    size_t cpus;          /* CPUs that the process could use when the last worker was created */
    struct loop *current; /* workers inside the gate read it, too */
    alignas(CACHE_LINE) atomic_uint gate;
    alignas(CACHE_LINE) atomic_uint epoch; /* the number of loops so far; idle workers watch it */
    atomic_bool spinning_pays;
    alignas(CACHE_LINE) atomic_uint sleeping; /* workers that have to be woken to notice a new epoch */
} pool;

static unsigned forks; /* the number of forks between the first process and this one */

/* ---- Waiting. sleep_while() may return without a reason. wake() is called after *word has changed. ---- */

#if defined(__linux__)

static void sleep_while(atomic_uint *word, unsigned value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(atomic_uint *word, unsigned threads)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}

static void forget_sleepers(void)
{
}

#else

static pthread_mutex_t sleep_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sleep_condition = PTHREAD_COND_INITIALIZER;

static void sleep_while(atomic_uint *word, unsigned value)
{
    pthread_mutex_lock(&sleep_mutex);
    if (atomic_load(word) == value)
        pthread_cond_wait(&sleep_condition, &sleep_mutex);
    pthread_mutex_unlock(&sleep_mutex);
}

static void wake(atomic_uint *word, unsigned threads)
{
    (void)word, (void)threads; /* one condition serves all words, so every sleeper checks its own */
    pthread_mutex_lock(&sleep_mutex);
    pthread_cond_broadcast(&sleep_condition);
    pthread_mutex_unlock(&sleep_mutex);
}

/* In a forked child the sleepers, and the holder of the mutex, do not exist. */
static void forget_sleepers(void)
{
    sleep_mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    sleep_condition = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}

#endif

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Watches *word for a short time. Returns true as soon as it differs from `value`. */
static bool changes_soon(atomic_uint *word, unsigned value)
{
    int64_t end = nanoseconds() + SPIN_NS;
    do {
        if (atomic_load_explicit(word, memory_order_acquire) != value)
            return true;
        relax();
    } while (atomic_load_explicit(&pool.spinning_pays, memory_order_relaxed) && nanoseconds() < end);
    return false;
}

/* ---- Both sides of a loop ---- */

/* A thread's role in a loop. `stop` is NULL for workers. */
struct role {
    struct loop *loop;
    const mha_stop *stop;
};

/* The role of this thread. NULL: it is in no loop, or there was no memory to remember one; then it polls less often. A
 * _Thread_local variable would not do: the system allocates those of an extension module when a thread first uses one,
 * and ends the process if there is no memory. */
static pthread_key_t role_key;
static bool has_role_key;

static const struct role *role_of_thread(void)
{
    return has_role_key ? pthread_getspecific(role_key) : NULL;
}

static void set_role_of_thread(const struct role *role)
{
    if (has_role_key)
        (void)pthread_setspecific(role_key, role);
}

static bool is_stopped(const struct role *role)
{
    struct loop *loop = role->loop;
    const mha_stop *stop = role->stop;
    if (stop != NULL && stop->should_stop != NULL && !atomic_load_explicit(&loop->stopped, memory_order_relaxed) &&
        stop->should_stop(stop->context)) {
        atomic_store_explicit(&loop->stopped, true, memory_order_relaxed);
        atomic_store_explicit(&loop->next, loop->tasks, memory_order_relaxed);
    }
    return atomic_load_explicit(&loop->stopped, memory_order_relaxed);
}

bool mha_is_stopped(void)
{
    const struct role *role = role_of_thread();
    return role != NULL && is_stopped(role);
}

/* Runs tasks until none is left or the loop is stopped. Returns whether it was stopped. Tickets need no memory order:
 * the gate orders the loop before its tasks, and the tasks before the caller's return. */
static bool run_tasks(struct loop *loop, size_t worker, const mha_stop *stop)
{
    const struct role *before = role_of_thread(); /* should_stop() may run a signal handler, and that another loop */
    const struct role role = {loop, stop};
    size_t task;
    set_role_of_thread(&role);
    while ((task = atomic_fetch_add_explicit(&loop->next, 1, memory_order_relaxed)) < loop->tasks) {
        loop->run(loop->context, task, worker);
        if (is_stopped(&role))
            break;
    }
    set_role_of_thread(before);
    return atomic_load_explicit(&loop->stopped, memory_order_relaxed);
}

/* ---- The workers' side ---- */

/* Takes a seat and returns its number. 0 if none is free. */
static unsigned enter_gate(void)
{
    unsigned gate = atomic_load_explicit(&pool.gate, memory_order_relaxed);
    while (gate >= SEAT)
        if (atomic_compare_exchange_weak_explicit(&pool.gate, &gate, gate - SEAT + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return gate / SEAT;
    return 0;
}

static void leave_gate(void)
{
    if (atomic_fetch_sub_explicit(&pool.gate, 1, memory_order_release) == (CALLER_SLEEPS | 1))
        wake(&pool.gate, 1);
}

static void await_epoch_after(unsigned seen)
{
    if (changes_soon(&pool.epoch, seen))
        return;
    /* Sequentially consistent, as in publish(): either publish() counts this sleeper, or this thread sees the new
     * epoch. */
    atomic_fetch_add(&pool.sleeping, 1);
    while (atomic_load(&pool.epoch) == seen)
        sleep_while(&pool.epoch, seen);
    atomic_fetch_sub_explicit(&pool.sleeping, 1, memory_order_relaxed);
}

static void *work(void *unused)
{
    (void)unused;
    for (;;) {
        /* The epoch is read first: a loop that opens the gate too late for enter_gate() changes the epoch
         * afterwards. */
        unsigned seen = atomic_load_explicit(&pool.epoch, memory_order_acquire);
        unsigned seat = enter_gate();
        if (seat != 0) {
            mha_leave_cpu(pool.current->cpu);
            fesetenv(&pool.current->environment);
            run_tasks(pool.current, seat, NULL);
            leave_gate();
        }
        await_epoch_after(seen);
    }
    return NULL;
}

/* ---- The caller's side ---- */

/* Runs in a forked child. The forking thread is alone there, and the pool may have been copied in any state. Nothing is
 * locked before a fork, so forking waits for no other thread. */
static void start_over_in_child(void)
{
    memset(&pool, 0, sizeof pool);
    forget_sleepers();
    forks++;
}

static bool may_publish; /* whether start_over_in_child() runs after every fork */

static void prepare(void)
{
    has_role_key = pthread_key_create(&role_key, NULL) == 0;
    may_publish = has_role_key && pthread_atfork(NULL, NULL, start_over_in_child) == 0;
}

/* Creates workers until there are `wanted`, or as many as the system allows. */
static void hire(unsigned wanted)
{
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);

    /* A new thread inherits the signal mask. Workers do not handle the signals of the process. Signals that a thread
     * raises by its own fault stay unblocked, since no other thread can take them and a crash reporter needs them. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);

    unsigned workers = pool.workers;
    pthread_t thread;
    while (workers < wanted && pthread_create(&thread, &attributes, work, NULL) == 0)
        workers++;

    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (workers > pool.workers)
        pool.cpus = mha_usable_cpus();
    pool.workers = workers;
}

/* Opens the gate to the loop for up to threads - 1 workers. Returns false if there can be none. */
static bool publish(struct loop *loop, size_t threads)
{
    if (threads < 2 || !may_publish || role_of_thread() != NULL ||
        atomic_exchange_explicit(&pool.busy, true, memory_order_acquire))
        return false;

    unsigned seats = (unsigned)mha_smaller(threads, MHA_MAX_THREADS) - 1;
    if (pool.workers < seats)
        hire(seats);
    if (pool.workers < seats)
        seats = pool.workers;
    if (seats == 0) {
        atomic_store_explicit(&pool.busy, false, memory_order_release);
        return false;
    }

    fegetenv(&loop->environment);
    pool.current = loop;
    const bool has_a_cpu_each = seats < pool.cpus;
    loop->cpu = has_a_cpu_each ? mha_current_cpu() : -1;
    atomic_store_explicit(&pool.spinning_pays, has_a_cpu_each, memory_order_relaxed);
    atomic_store_explicit(&pool.gate, seats * SEAT, memory_order_release);
    atomic_fetch_add(&pool.epoch, 1);
    unsigned awake = pool.workers - atomic_load(&pool.sleeping); /* they see the new epoch without being woken */
    if (awake < seats)
        wake(&pool.epoch, seats - awake);
    return true;
}

/* Closes the gate, waits for the workers inside, and releases the pool. */
static void withdraw(void)
{
    unsigned gate = atomic_fetch_and_explicit(&pool.gate, INSIDE, memory_order_acquire) & INSIDE;
    while (gate != 0 && changes_soon(&pool.gate, gate))
        gate = atomic_load_explicit(&pool.gate, memory_order_acquire);
    if (gate != 0) {
        gate = atomic_fetch_or_explicit(&pool.gate, CALLER_SLEEPS, memory_order_acquire) | CALLER_SLEEPS;
        while (gate != CALLER_SLEEPS) {
            sleep_while(&pool.gate, gate);
            gate = atomic_load_explicit(&pool.gate, memory_order_acquire);
        }
    }
    atomic_store_explicit(&pool.busy, false, memory_order_release);
}

static mha_status run_in_task(size_t tasks, mha_task run, void *context)
{
    for (size_t task = 0; task < tasks; task++) {
        run(context, task, 0);
        if (mha_is_stopped())
            return MHA_STOPPED;
    }
    return MHA_OK;
}

mha_status mha_parallel_for(const mha_team *team, size_t tasks, mha_task run, void *context)
{
    if (team->in_task)
        return run_in_task(tasks, run, context);
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct loop loop = {.run = run, .context = context, .tasks = tasks};
    pthread_once(&once, prepare);
    unsigned forks_before = forks;
    bool published = publish(&loop, team->threads < tasks ? team->threads : tasks);
    bool stopped = run_tasks(&loop, 0, &team->stop);

    if (published && forks != forks_before)
        return MHA_STOPPED; /* should_stop() forked; in the child the workers' tasks are lost, and the pool is new */
    if (published)
        withdraw();
    return stopped ? MHA_STOPPED : MHA_OK;
}
