"""The contract between the hypervisor and its guests: numbers, layouts, errors, limits. No behaviour, no state.

    op  call               sub-operations                                               module
    12  memory_op          decrease_reservation 1, current_reservation 3,
                           maximum_reservation 4, populate_physmap 6                    memory
    13  multicall                                                                       version
    15  set_timer_op                                                                    sched
    17  xen_version        version 0, extraversion 1, pagesize 7                        version
    18  console_io         write 0                                                      console
    20  grant_table_op     map 0, unmap 1, setup_table 2, transfer 4, copy 5,
                           query_size 6                                                 grant
    29  sched_op           yield 0, block 1, shutdown 2, poll 3                         sched
    32  event_channel_op   bind_interdomain 0, bind_virq 1, close 3, send 4, status 5,
                           alloc_unbound 6, bind_ipi 7, unmask 9, reset 10              evtchn
    35  sysctl             readconsole 1, physinfo 3, getdomaininfolist 6, ledger 1000,
                           process_memory 1001                                          sysctl
    36  domctl             create 1, destroy 2, pause 3, unpause 4, getdomaininfo 5,
                           getvcpuinfo 14,
                           map_foreign 1000, unmap_foreign 1001, launch_info 1002       domctl
                           scheduler_op 16                                              scheduler
    48  callring           setup 0, kick 1                                              callring

ABI.md says the same with offsets and rules; ring1.h, ring1_message.h and io/ring1_io.h are the same for C.
"""
