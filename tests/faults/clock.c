/* A wall clock that jumps: FAULT_CLOCK names a file of one double, the seconds by which this process's clock is wrong; it may change at
   any time. Monotonic clocks are right, as they are when a real clock is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static double offset(void) {
  static const volatile double *mapped;
  if (!mapped) {
    const char *path = getenv("FAULT_CLOCK");
    int descriptor = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (descriptor < 0) return 0;
    void *memory = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (memory == MAP_FAILED) return 0;
    mapped = memory;
  }
  return *mapped;
}

static void move(struct timespec *time, double seconds) {
  double whole = floor(seconds);
  time->tv_sec += (time_t)whole;
  time->tv_nsec += (long)((seconds - whole) * 1e9);
  if (time->tv_nsec >= 1000000000L) time->tv_sec++, time->tv_nsec -= 1000000000L;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, time);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) move(time, offset());
  return result;
}

int gettimeofday(struct timeval *restrict value, void *restrict zone) {
  struct timespec now;
  (void)zone;
  int result = clock_gettime(CLOCK_REALTIME, &now);
  value->tv_sec = now.tv_sec;
  value->tv_usec = now.tv_nsec / 1000;
  return result;
}

time_t time(time_t *result) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (result) *result = now.tv_sec;
  return now.tv_sec;
}

/* Waits until a time of the wrong clock are waits until a time of the right one; times of the monotonic clock are far smaller. */
static struct timespec corrected(const struct timespec *until) {
  struct timespec result = *until;
  if (until->tv_sec > 1000000000) move(&result, -offset());
  return result;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
  static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec time = corrected(until);
  return real(condition, mutex, &time);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
  static int (*real)(sem_t *, const struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
  struct timespec time = corrected(until);
  return real(semaphore, &time);
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
  static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
  struct timespec time = clock == CLOCK_REALTIME ? corrected(until) : *until;
  return real(condition, mutex, clock, &time);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
  static int (*real)(sem_t *, clockid_t, const struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "sem_clockwait");
  struct timespec time = clock == CLOCK_REALTIME ? corrected(until) : *until;
  return real(semaphore, clock, &time);
}
