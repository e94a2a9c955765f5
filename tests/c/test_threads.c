/* SPDX-License-Identifier: Apache-2.0
 *
 * test_threads.c - the pool's promises (csrc/threads.h), one function each; prints them, exits 0 if all are kept.
 *
 *     cc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Wconversion -Wshadow -Icsrc tests/c/test_threads.c csrc/threads.c \
 *        csrc/processors.c -o test_threads -lpthread -lm && ./test_threads
 *
 * Also to be run with -fsanitize=thread, with -fsanitize=address,undefined and under `taskset -c 0`.
 * Assumes nothing about the number of CPUs. A hang ends by SIGALRM.
 */
#include "processors.h"
#include "threads.h"

#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_S = 300, MAX_TASKS = 1000, MAX_THREADS = 9 };

static const mha_stop NEVER = {0};

static mha_status loop_over(size_t threads, size_t tasks, mha_task run, void *context, mha_stop stop)
{
    return mha_parallel_for(&(mha_team){.threads = threads, .stop = stop}, tasks, run, context);
}
static atomic_int failures;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                                    \
            atomic_fetch_add(&failures, 1);                                                                            \
        }                                                                                                              \
    } while (0)

/* ThreadSanitizer's own default is to give up on threads after a fork, which is what is tested here. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void)
{
    return "die_after_fork=0";
}

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void sleep_ms(long ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

#if defined(__linux__)

/* Moves this thread to a CPU, and keeps it there; returns 0 if that was possible. */
static int stay_on(int cpu)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET((size_t)cpu, &one);
    return sched_setaffinity(0, sizeof one, &one);
}

#endif

/* ---- A loop that watches over itself ---- */

struct watch {
    size_t threads;
    atomic_uint runs[MAX_TASKS];
    atomic_bool taken[MAX_THREADS]; /* worker numbers in use */
    atomic_size_t running;
};

static void watched_task(void *context, size_t task, size_t worker)
{
    struct watch *watch = context;
    CHECK(worker < watch->threads);
    CHECK(!atomic_exchange(&watch->taken[worker], true));
    atomic_fetch_add(&watch->running, 1);
    atomic_fetch_add(&watch->runs[task], 1);
    atomic_fetch_sub(&watch->running, 1);
    atomic_store(&watch->taken[worker], false);
}

static void run_watched(size_t threads, size_t tasks)
{
    struct watch watch = {.threads = threads};
    CHECK(loop_over(threads, tasks, watched_task, &watch, NEVER) == MHA_OK);
    CHECK(atomic_load(&watch.running) == 0);
    for (size_t task = 0; task < tasks; task++)
        CHECK(atomic_load(&watch.runs[task]) == 1);
}

/* ---- Tasks that wait for each other, so that each runs in a thread of its own ---- */

struct meeting {
    size_t expected;
    atomic_size_t arrived;
    void (*look)(size_t worker); /* what every thread is to check of itself */
};

static void meet(void *context, size_t task, size_t worker)
{
    struct meeting *meeting = context;
    (void)task;
    atomic_fetch_add(&meeting->arrived, 1);
    for (double end = seconds(CLOCK_MONOTONIC) + PATIENCE_S / 2; seconds(CLOCK_MONOTONIC) < end; sched_yield())
        if (atomic_load(&meeting->arrived) == meeting->expected)
            break;
    CHECK(atomic_load(&meeting->arrived) == meeting->expected);
    if (meeting->look != NULL)
        meeting->look(worker);
}

static void run_meeting(size_t threads, void (*look)(size_t worker))
{
    struct meeting meeting = {.expected = threads, .look = look};
    CHECK(loop_over(threads, threads, meet, &meeting, NEVER) == MHA_OK);
}

/* ---- In a process of its own, which exits 0 if it found nothing wrong ---- */

static void start_child(void)
{
    atomic_store(&failures, 0);
    alarm(PATIENCE_S);
}

static _Noreturn void end_child(void)
{
    _exit(atomic_load(&failures) == 0 ? 0 : 1);
}

static void check_child(pid_t child)
{
    int status = -1;
    CHECK(child > 0);
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void in_child(void (*test)(void))
{
    pid_t child = fork();
    if (child == 0) {
        start_child();
        test();
        end_child();
    }
    check_child(child);
}

/* ---- The tests ---- */

static void every_task_runs_once(void)
{
    static const size_t tasks[] = {0, 1, 2, 3, 4, 7, 8, 9, 64, 65, MAX_TASKS};
    for (size_t repeat = 0; repeat < 10; repeat++)
        for (size_t threads = 1; threads <= MAX_THREADS; threads++)
            for (size_t i = 0; i < sizeof tasks / sizeof *tasks; i++)
                run_watched(threads, tasks[i]);
}

static void workers_take_part(void)
{
    for (size_t threads = 1; threads <= MAX_THREADS; threads++)
        run_meeting(threads, NULL);
    run_meeting(2, NULL); /* fewer than there are by now */
}

struct order {
    pthread_t thread;
    size_t next;
};

static void ordered_task(void *context, size_t task, size_t worker)
{
    struct order *order = context;
    CHECK(worker == 0);
    CHECK(task == order->next++);
    CHECK(pthread_equal(pthread_self(), order->thread));
}

static void run_ordered(size_t threads)
{
    struct order order = {.thread = pthread_self()};
    CHECK(loop_over(threads, 20, ordered_task, &order, NEVER) == MHA_OK);
    CHECK(order.next == 20);
}

static void nesting_task(void *context, size_t task, size_t worker)
{
    (void)context, (void)task, (void)worker;
    run_ordered(4);
}

static void nested_calls_are_serial(void)
{
    run_ordered(1);
    CHECK(loop_over(4, 50, nesting_task, NULL, NEVER) == MHA_OK);
    CHECK(loop_over(1, 5, nesting_task, NULL, NEVER) == MHA_OK);
    run_meeting(2, NULL); /* and the one after that is parallel again */
}

static void *call_often(void *unused)
{
    for (size_t i = 0; i < 300; i++)
        run_watched(1 + i % 5, i % 40);
    return unused;
}

static void callers_share_the_pool(void)
{
    pthread_t callers[4];
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_create(&callers[i], NULL, call_often, NULL) == 0);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(callers[i], NULL) == 0);
}

static atomic_bool enough;

static void *call_until_enough(void *unused)
{
    while (!atomic_load(&enough))
        run_watched(3, 30);
    return unused;
}

static void both_sides_of_a_fork_go_on(void)
{
    pthread_t caller;
    atomic_store(&enough, false);
    CHECK(pthread_create(&caller, NULL, call_until_enough, NULL) == 0);
    for (size_t i = 0; i < 20; i++) {
        sleep_ms((long)i % 3);
        pid_t child = fork();
        if (child == 0) {
            start_child();
            run_meeting(3, NULL);
            run_watched(4, 100);
            in_child(every_task_runs_once);
            end_child();
        }
        run_watched(3, 30);
        check_child(child);
    }
    atomic_store(&enough, true);
    CHECK(pthread_join(caller, NULL) == 0);
    run_meeting(3, NULL);
}

struct brake {
    pthread_t caller;
    size_t asked, answer_at;
    pid_t child; /* of fork_once(): 0 in the child itself */
};

static bool stop_at(void *context)
{
    struct brake *brake = context;
    CHECK(pthread_equal(pthread_self(), brake->caller));
    return ++brake->asked >= brake->answer_at;
}

/* Helpers leave half of the tasks until the loop is stopped, however late the system lets the caller run. */
static void leave_some_to_the_caller(void *context, size_t task, size_t worker)
{
    watched_task(context, task, worker);
    sleep_ms(1);
    while (worker != 0 && task >= MAX_TASKS / 2 && !mha_is_stopped())
        sleep_ms(1);
}

static void stopping(void)
{
    for (size_t threads = 1; threads <= 4; threads++) {
        struct watch watch = {.threads = threads};
        struct brake brake = {.caller = pthread_self(), .answer_at = 3};
        mha_stop stop = {.should_stop = stop_at, .context = &brake};
        size_t runs = 0;
        CHECK(loop_over(threads, MAX_TASKS, leave_some_to_the_caller, &watch, stop) == MHA_STOPPED);
        CHECK(atomic_load(&watch.running) == 0);
        CHECK(brake.asked == 3);
        for (size_t task = 0; task < MAX_TASKS; task++) {
            CHECK(atomic_load(&watch.runs[task]) <= 1);
            runs += atomic_load(&watch.runs[task]);
        }
        CHECK(runs >= 3 && runs < MAX_TASKS);
        CHECK(threads > 1 || runs == 3);

        brake.answer_at = SIZE_MAX;
        CHECK(loop_over(threads, 20, watched_task, &(struct watch){.threads = threads}, stop) == MHA_OK);
    }
}

static atomic_bool forked;

/* A loop that belongs to task 2 of another, and how far it came. */
static void loop_in_task(void *context, size_t task, size_t worker)
{
    struct order *order = context;
    CHECK(worker == 0);
    if (task == 2) {
        const mha_status status = mha_parallel_for(&(mha_team){.threads = 4, .in_task = true}, 20, ordered_task, order);
        CHECK(status == MHA_STOPPED || order->next == 20);
    }
}

static void stopping_a_task_with_its_loop(void)
{
    for (size_t answer_at = 1; answer_at < 40; answer_at++) { /* asked after each of 5 tasks and 20 within one */
        struct brake brake = {.caller = pthread_self(), .answer_at = answer_at};
        struct order order = {.thread = pthread_self()};
        const mha_stop stop = {.should_stop = stop_at, .context = &brake};
        const mha_status status = loop_over(1, 5, loop_in_task, &order, stop);
        CHECK(status == (answer_at <= 25 ? MHA_STOPPED : MHA_OK));
        CHECK(order.next == (answer_at < 3 ? 0 : answer_at < 22 ? answer_at - 2 : 20));
    }
}

static bool fork_once(void *context)
{
    struct brake *brake = context;
    if (brake->asked++ == 0) {
        brake->child = fork();
        atomic_store(&forked, true);
    }
    return false;
}

static void wait_for_the_fork(void *context, size_t task, size_t worker)
{
    watched_task(context, task, worker);
    sleep_ms(1);
    while (worker != 0 && !atomic_load(&forked))
        sleep_ms(1);
}

static void should_stop_may_fork(void)
{
    struct watch watch = {.threads = 3};
    struct brake brake = {.caller = pthread_self(), .child = -1};
    const mha_stop stop = {.should_stop = fork_once, .context = &brake};
    mha_status status = loop_over(3, 50, wait_for_the_fork, &watch, stop);
    if (brake.child == 0) {
        start_child();
        CHECK(status == MHA_STOPPED);
        run_meeting(3, NULL);
        end_child();
    }
    CHECK(status == MHA_OK);
    check_child(brake.child);
}

static int expected_rounding;

static void look_at_rounding(size_t worker)
{
    (void)worker;
    CHECK(fegetround() == expected_rounding);
}

static void workers_round_as_the_caller(void)
{
    static const int modes[] = {FE_UPWARD, FE_TOWARDZERO, FE_TONEAREST};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        CHECK(fesetround(modes[i]) == 0);
        expected_rounding = modes[i];
        run_meeting(3, look_at_rounding);
        CHECK(fegetround() == modes[i]);
    }
}

static void look_at_signals(size_t worker)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGALRM, SIGCHLD, SIGUSR1, SIGPIPE, SIGPROF};
    static const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE}; /* of the thread itself */
    sigset_t blocked;
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &blocked) == 0);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        CHECK(sigismember(&blocked, signals[i]) == (worker != 0));
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        CHECK(sigismember(&blocked, faults[i]) == 0);
}

static void workers_leave_signals_alone(void)
{
    run_meeting(4, look_at_signals);
}

#if defined(__linux__)

static cpu_set_t all_cpus;
static int callers_cpu;
static atomic_uint in_the_callers_place;

static void get_in_the_callers_way(size_t worker)
{
    if (worker != 0)
        CHECK(stay_on(callers_cpu) == 0 && sched_setaffinity(0, sizeof all_cpus, &all_cpus) == 0);
}

static void look_at_cpu(size_t worker)
{
    cpu_set_t allowed;
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    if (worker != 0)
        CHECK(CPU_EQUAL(&allowed, &all_cpus));
    atomic_fetch_add(&in_the_callers_place, worker != 0 && sched_getcpu() == callers_cpu);
}

#endif

/* Not each time: the system, too, moves threads. */
static void workers_leave_the_caller_its_cpu(void)
{
#if defined(__linux__)
    enum { REPEATS = 50 };
    CHECK(sched_getaffinity(0, sizeof all_cpus, &all_cpus) == 0);
    run_meeting(2, NULL);
    if (mha_usable_cpus() < 2)
        return;
    callers_cpu = sched_getcpu();
    CHECK(stay_on(callers_cpu) == 0);
    for (size_t i = 0; i < REPEATS; i++) {
        run_meeting(2, get_in_the_callers_way);
        run_meeting(2, look_at_cpu);
    }
    CHECK(atomic_load(&in_the_callers_place) < REPEATS / 4);
#endif
}

static void loops_in_a_row(void)
{
    for (size_t i = 0; i < 10000; i++)
        run_watched(2, 2);
}

static void empty_task(void *context, size_t task, size_t worker)
{
    (void)context, (void)task, (void)worker;
}

static void report_cost(void)
{
    enum { LOOPS = 20000 };
    double start = seconds(CLOCK_MONOTONIC);
    for (size_t i = 0; i < LOOPS; i++)
        loop_over(2, 2, empty_task, NULL, NEVER);
    printf("    %.2f us for an empty loop over 2 tasks\n", 1e6 * (seconds(CLOCK_MONOTONIC) - start) / (double)LOOPS);
}

static void idle_workers_rest(void)
{
    static const size_t threads[] = {2, MAX_THREADS}; /* as a rule: spinning pays, does not pay */
    for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
        run_meeting(threads[i], NULL);
        sleep_ms(20);
        double before = seconds(CLOCK_PROCESS_CPUTIME_ID);
        sleep_ms(300);
        CHECK(seconds(CLOCK_PROCESS_CPUTIME_ID) - before < 0.05);
    }
}

/* Threads cannot be created while the default size of a stack exceeds every address space. */
static void threads_that_cannot_start(void)
{
#if defined(__GLIBC__)
    pthread_attr_t usual, huge;
    CHECK(pthread_getattr_default_np(&usual) == 0);
    CHECK(pthread_attr_init(&huge) == 0);
    CHECK(pthread_attr_setstacksize(&huge, (size_t)1 << 60) == 0);

    CHECK(pthread_setattr_default_np(&huge) == 0);
    run_ordered(4); /* none: serial */
    CHECK(pthread_setattr_default_np(&usual) == 0);
    run_meeting(2, NULL);
    CHECK(pthread_setattr_default_np(&huge) == 0);
    run_watched(4, 100); /* one of three */
    CHECK(pthread_setattr_default_np(&usual) == 0);
    run_meeting(4, NULL);
#endif
}

static void usable_cpus(void)
{
    size_t cpus = mha_usable_cpus();
    CHECK(cpus >= 1 && cpus <= (size_t)sysconf(_SC_NPROCESSORS_CONF));
#if defined(__linux__)
    CHECK(stay_on(sched_getcpu()) == 0);
    CHECK(mha_usable_cpus() == 1);
    run_watched(4, 100);
    run_meeting(4, NULL);
#endif
}

/* exit() with one thread in the middle of a loop and workers spinning, working and sleeping. */
static void exit_does_not_wait(void)
{
    pthread_t caller;
    atomic_store(&enough, false);
    CHECK(pthread_create(&caller, NULL, call_until_enough, NULL) == 0);
    CHECK(pthread_detach(caller) == 0);
    run_watched(6, 100);
    sleep_ms(5);
    exit(atomic_load(&failures) == 0 ? 0 : 1);
}

int main(void)
{
    static const struct {
        const char *promise;
        void (*test)(void);
        bool alone; /* in a process of its own, and first: ThreadSanitizer loses track in children of many threads */
    } tests[] = {
        {"where threads cannot be created, fewer take part", threads_that_cannot_start, true},
        {"usable CPUs follow the affinity mask", usable_cpus, true},
        {"exit() waits for no worker", exit_does_not_wait, true},
        {"workers leave the caller its CPU, and keep theirs", workers_leave_the_caller_its_cpu, true},
        {"every task runs once, under a worker number of its own", every_task_runs_once, false},
        {"as many threads take part as were asked for", workers_take_part, false},
        {"calls from inside a task are serial", nested_calls_are_serial, false},
        {"several callers share the pool", callers_share_the_pool, false},
        {"after a fork in the midst of a loop, parent and child both go on", both_sides_of_a_fork_go_on, false},
        {"should_stop() ends a loop, asked by the caller alone", stopping, false},
        {"a loop within a task is stopped with it", stopping_a_task_with_its_loop, false},
        {"should_stop() may fork", should_stop_may_fork, false},
        {"workers round as the caller does", workers_round_as_the_caller, false},
        {"workers take no signals", workers_leave_signals_alone, false},
        {"10,000 loops in a row", loops_in_a_row, false},
        {"what a loop costs", report_cost, false},
        {"idle workers rest", idle_workers_rest, false},
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        printf("%s\n", tests[i].promise);
        fflush(stdout);
        alarm(PATIENCE_S);
        if (tests[i].alone)
            in_child(tests[i].test);
        else
            tests[i].test();
    }
    printf("%d failures\n", atomic_load(&failures));
    return atomic_load(&failures) == 0 ? 0 : 1;
}
